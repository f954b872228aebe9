"""Whether a plan can do on a model's layers what it says: checks that come before anything is touched."""

import logging
import re
from typing import Any, NoReturn

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import Dense, Form
from hf_drt.planning.idle_settings import refuse_idle, usage_of_plan
from hf_drt.planning.layers import Shapes
from hf_drt.planning.ranks import break_even_of, stays_dense
from hf_drt.planning.resolve import budget_of
from hf_drt.planning.resolved import ResolvedPlan
from hf_drt.schedule import LOW_RANK, Phase, Plan, Trigger, whole_number

logger = logging.getLogger(__name__)


def check_arguments(model: Any, max_steps: Any, plan: Any, trigger: Any, seed: Any) -> None:
    """What :class:`hf_drt.DynamicRank` is given beside its settings.

    Raises:
        TypeError: The model, plan or trigger is of another type.
        ValueError: The seed or ``max_steps`` is no such number, or the plan is of another length.
    """
    by_hand = "Pass Schedule.parse(text).resolve(Run(max_steps)), or the text as the config."
    for name, value, kind, expected, way in (
        ("model", model, nn.Module, "an nn.Module", "Pass the model itself."),
        ("plan", plan, Plan | ResolvedPlan | None, "a Plan, a ResolvedPlan or None", by_hand),
        ("trigger", trigger, Trigger | None, "a Trigger or None", "Pass Schedule.parse(text).trigger."),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {expected}, got {value!r}. {way}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}.")
    if max_steps is not None:
        whole_number("max_steps", max_steps)
    plan = plan.plan if isinstance(plan, ResolvedPlan) else plan
    if plan is not None and max_steps not in (None, plan.max_steps):
        raise ValueError(f"max_steps is {max_steps}, but the plan is of {plan.max_steps} update steps. Leave it out.")


def check_step(step: Any, before: int) -> None:
    """The update step that a loop begins, after ``before``.

    Raises:
        ValueError: It is no whole number, or an earlier one.
    """
    if whole_number("step", step) < before:
        raise ValueError(
            f"begin_step({step}) comes after begin_step({before}). Count update steps over the whole run, not from 0 "
            "in every epoch: a phase that is over would begin again."
        )


def refuse_without_optimizer(phase: Phase, step: int) -> NoReturn:
    """A change of form in a loop, without its optimizer: ValueError."""
    raise ValueError(
        f"phase '{phase}' begins at update step {step}, but begin_step got no optimizer, so that the new weights would "
        "never be trained. Pass the optimizer; to change the form of a model that is not trained, call apply(step)."
    )


def check_resolved(resolved: ResolvedPlan, in_trainer: bool) -> None:
    """All that can be wrong with a plan on a model; what is odd, but not wrong, is warned of.

    Raises:
        ValueError: A setting would have no effect (:mod:`hf_drt.planning.idle_settings`); as :func:`check_phase`, and
            with a trigger as :func:`check_room_for_windows`.
    """
    targets, config = resolved.targets, resolved.config
    for note in targets.notes:
        logger.warning("%s.", note)
    refuse_idle(usage_of_plan(resolved, in_trainer))
    ever_low = any(not isinstance(form, Dense) for forms in resolved.forms_by_phase for form in forms.values())
    for phase, forms in zip(resolved.plan.phases, resolved.forms_by_phase, strict=True):
        check_phase(phase, forms, targets.shapes, config, may_be_dense=resolved.splits and ever_low)
    _warn_of_idle_levels(resolved)
    if resolved.trigger is not None:
        check_room_for_windows(resolved.plan, resolved.cost.flops, budget_of(config, {resolved.plan.phases[0].kind}))
    for pattern in config.patterns:
        if not any(re.search(pattern, name) for name in targets.shapes):
            logger.warning("rank_pattern: %r matches none of the %d layers.", pattern, len(targets.shapes))


def _warn_of_idle_levels(resolved: ResolvedPlan) -> None:
    """Say so where a level of rank rounds to the one before it in every layer: a switch for nothing."""
    recasts = sum(resolved.plan.recasts(index - 1, index) for index in range(1, len(resolved.plan)))
    idle = len(resolved.plan) - 1 - recasts - resolved.cost.switches
    if resolved.splits and idle > 0:
        logger.warning(
            "%d of the %d changes of phase change no layer, since ranks are rounded to multiples of %d and stay below "
            "break-even. Take fewer levels, a smaller rank_multiple, or other ranks.",
            idle, len(resolved.plan) - 1, resolved.config.rank_multiple,
        )  # fmt: skip


def check_phase(
    phase: Phase, forms: dict[str, Form], targets: Shapes, config: DRTConfig, may_be_dense: bool = False
) -> None:
    """Refuse a low-rank phase in which no layer would be in low rank; say in the log which layers stay dense, and why.

    Args:
        phase: Of the plan.
        forms: The form of every target layer in it, by name.
        targets: ``(out, in)`` of every target layer, by name.
        config: The settings that the forms come from.
        may_be_dense: Whether all layers may stay dense, as at the upper end of ranks that fall.

    Raises:
        ValueError: All layers would stay dense, or a setting has no product of two factors to act on.
    """
    if not LOW_RANK & set(phase.kinds):
        return
    _check_products(forms, config)
    if phase.parts:  # of whose layers all others are in low rank, or were refused before
        return
    dense = [name for name, form in forms.items() if form == Dense()]
    kept = dict.fromkeys(name for name in dense if stays_dense(phase.kind, name, config))
    if len(dense) == len(targets) and not may_be_dense:
        raise ValueError(_all_dense(phase, kept, targets, config))
    if kept:
        logger.info(
            "phase '%s': %d of %d layers, query and key projections, stay dense (dense_query_key).",
            phase, len(kept), len(targets),
        )  # fmt: skip
    if forced := [name for name in dense if name not in kept]:
        logger.warning(
            "phase '%s': %d of %d layers %s dense, since their rank would reach break-even: %s",
            phase, len(forced), len(targets), "are" if may_be_dense else "stay", ", ".join(forced),
        )  # fmt: skip


def _check_products(forms: dict[str, Form], config: DRTConfig) -> None:
    low_rank = (form for form in forms.values() if not isinstance(form, Dense))
    if all(form.product.two_matrices for form in low_rank):
        return
    for name, off, does in (
        ("frobenius_decay", False, "is the decay of"),
        ("matrix_optimizer", "none", "is of"),
        ("left_lr_scale", 1, "is of the left factor of"),
        ("right_lr_scale", 1, "is of the right factor of"),
    ):
        if getattr(config, name) != off:
            brought = config.without_matrix_optimizer if name == "matrix_optimizer" else ""
            raise ValueError(
                f"{name} {does} a product U V, and decomposition='{config.decomposition}' is of other tensors. Use "
                f"decomposition='svd', or {'do without it' if brought else f'leave {name} out'}.{brought}"
            )


def _all_dense(phase: Phase, kept: dict[str, None], targets: Shapes, config: DRTConfig) -> str:
    if len(kept) == len(targets):
        return (
            f"phase '{phase}' leaves all {len(kept)} layers dense: they are query and key projections, which "
            "dense_query_key keeps. Set dense_query_key to False, or include more layers."
        )
    name, shape = next((name, shape) for name, shape in targets.items() if name not in kept)
    limit = break_even_of(shape, config.decomposition)
    return (
        f"phase '{phase}' leaves all {len(targets)} layers dense: their ranks reach break-even, e.g. "
        f"{limit:.4g} for {name} of shape (out, in) = {shape}, from where factors cost "
        "more than W. Lower the rank (in the schedule, rank_pattern, rank or rank_ratio), or rank_multiple "
        "for small layers."
    )


def check_room_for_windows(plan: Plan, flops: float, limit: float) -> None:
    """Refuse a plan to which a trigger could add no full-rank window.

    Args:
        plan: Before any window.
        flops: Its share of the dense training FLOPs.
        limit: The budget that the whole run may take of them.

    Raises:
        ValueError: It is not one low-rank phase, or takes the budget by itself.
    """
    if len(plan) > 1 or plan.phases[0].kind == "dense":
        raise ValueError(
            f"a trigger adds full-rank windows to a plan of one low-rank phase, got the plan '{plan}'. Leave "
            "the trigger out, or give a plan such as 'factored@0'."
        )
    if flops >= limit:
        raise ValueError(
            f"'{plan}' alone takes {flops:.3f} of the dense training FLOPs, and the budget is {limit:g}: no "
            "full-rank window could begin. Lower the rank (rank_ratio, rank, rank_pattern; rank_multiple in small "
            "layers), or raise the budget."
        )
