"""A schedule on a model: ranks, checks, cost, and what `auto` comes to."""

from hf_drt.planning.checks import check_arguments, check_phase, check_room_for_windows
from hf_drt.planning.cost import PlanCost, plan_cost
from hf_drt.planning.idle_settings import (
    Usage,
    idle_settings,
    refuse_idle,
    refuse_without_schedule,
    usage_of,
    usage_of_plan,
)
from hf_drt.planning.ranks import (
    break_even_of,
    break_even_rank,
    is_query_or_key,
    resolve_form,
    resolve_rank,
    stays_dense,
)
from hf_drt.planning.resolve import Resolution, budget_of, lowrank_kind, plan_from, resolution, resolved_plan

__all__ = [
    "PlanCost",
    "Resolution",
    "Usage",
    "break_even_of",
    "break_even_rank",
    "budget_of",
    "check_arguments",
    "check_phase",
    "check_room_for_windows",
    "idle_settings",
    "is_query_or_key",
    "lowrank_kind",
    "plan_cost",
    "plan_from",
    "refuse_idle",
    "refuse_without_schedule",
    "resolution",
    "resolve_form",
    "resolve_rank",
    "resolved_plan",
    "stays_dense",
    "usage_of",
    "usage_of_plan",
]
