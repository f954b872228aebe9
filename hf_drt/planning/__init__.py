"""A schedule on a model: ranks, checks, cost, and what `auto` comes to."""

from hf_drt.planning.checks import check_arguments, check_resolved, check_step, refuse_without_optimizer
from hf_drt.planning.cost import PlanCost
from hf_drt.planning.description import chosen, description, facts, headline
from hf_drt.planning.gathering import gathered_at
from hf_drt.planning.groups import group_counts, mean_falls
from hf_drt.planning.idle_settings import Usage, idle_settings, refuse_idle, refuse_without_schedule, usage_of
from hf_drt.planning.layers import LayersOf, TargetLayers
from hf_drt.planning.origin import lowrank_kind
from hf_drt.planning.paces import Paces, measured_paces
from hf_drt.planning.ranks import (
    break_even_of,
    break_even_rank,
    is_query_or_key,
    resolve_form,
    resolve_rank,
    stays_dense,
)
from hf_drt.planning.resolve import (
    Resolution,
    budget_of,
    resolution,
    resolved_for,
    resolved_plan,
    schedule_of,
    settled,
)
from hf_drt.planning.resolved import ResolvedPlan
from hf_drt.planning.update_cost import update_multiply_adds, update_tokens

__all__ = [
    "LayersOf",
    "Paces",
    "PlanCost",
    "Resolution",
    "ResolvedPlan",
    "TargetLayers",
    "Usage",
    "break_even_of",
    "break_even_rank",
    "budget_of",
    "check_arguments",
    "check_resolved",
    "check_step",
    "chosen",
    "description",
    "facts",
    "gathered_at",
    "group_counts",
    "headline",
    "idle_settings",
    "is_query_or_key",
    "lowrank_kind",
    "mean_falls",
    "measured_paces",
    "refuse_idle",
    "refuse_without_optimizer",
    "refuse_without_schedule",
    "resolution",
    "resolve_form",
    "resolve_rank",
    "resolved_for",
    "resolved_plan",
    "schedule_of",
    "settled",
    "stays_dense",
    "update_multiply_adds",
    "update_tokens",
    "usage_of",
]
