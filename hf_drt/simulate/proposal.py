"""A rank, and where need be shorter dense windows, that keep a run within a share of its dense training FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_drt.config import DRTConfig
from hf_drt.forms import Dense, LayerShape, flops_of
from hf_drt.planning import resolve_form
from hf_drt.schedule import Phase, Plan

RATIOS = tuple(k / 128 for k in range(4, 64))
"""Rank ratios to choose from, 1/32 to just below 1/2, where a square layer breaks even."""


@dataclass(frozen=True)
class Proposal:
    """What keeps a run within its budget.

    Attributes:
        plan: The plan asked for, or one with shorter dense windows.
        rank_ratio: Share of min(out, in) in its low-rank phases.
        share: FLOPs of the run over those of dense training.
    """

    plan: Plan
    rank_ratio: float
    share: float


@dataclass(frozen=True)
class Layer:
    """A target layer: name, ``(out, in)``, and the vectors that it multiplies in an update step's forward passes."""

    name: str
    shape: LayerShape
    rows: int


def propose(budget: float, plan: Plan, layers: Sequence[Layer], step_flops: float, config: DRTConfig) -> Proposal:
    """The largest rank ratio of :data:`RATIOS` that keeps the run within the budget.

    The plan's windows stay as they are, unless the smallest ratio exceeds the budget: then all dense windows are cut
    short alike, at their ends (a last one at its start), and the ratio is the smallest. Ranks that the plan itself or
    ``rank_pattern`` gives stay as they are.

    A run of factored and dense phases alone has the share ``1 - t + t sum_k s_k f_k``, with t the target layers' share
    of a dense step's FLOPs, s_k a phase's share of the update steps and f_k that of its layers' FLOPs.

    Args:
        budget: Share of the dense training FLOPs of the run, in (0, 1).
        plan: Resolved phases.
        layers: The target layers.
        step_flops: FLOPs of a dense update step of the whole model, two per multiply-add.
        config: Its ``rank_multiple`` and ``rank_pattern`` are used.

    Raises:
        ValueError: The budget is outside its interval, or cannot be reached; the message gives the least share.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget must lie in (0, 1), got {budget:g}. It is a share of the dense training FLOPs.")
    if mixed := next((phase for phase in plan.phases if phase.parts), None):
        raise ValueError(
            f"'{mixed}' brings a group of layers into a form, and a budget is met by the ranks and windows of all "
            "layers. Give a schedule without groups."
        )
    if all(phase.kind == "dense" for phase in plan.phases):
        raise ValueError("the plan is dense throughout: there is no rank to choose. Give a schedule with low rank.")

    def share(plan: Plan, ratio: float) -> float:
        saved = sum(
            (plan.end_of(index) - phase.start) * _saved(phase, layers, replace(config, rank=None, rank_ratio=ratio))
            for index, phase in enumerate(plan.phases)
        )
        return 1 - saved / (plan.max_steps * step_flops)

    for ratio in reversed(RATIOS):
        if (reached := share(plan, ratio)) <= budget:
            return Proposal(plan, ratio, reached)
    for kept in range(99, -1, -1):
        shorter = _shortened(plan, kept / 100)
        if (reached := share(shorter, RATIOS[0])) <= budget:
            return Proposal(shorter, RATIOS[0], reached)
    written = all(phase.rank is not None for phase in plan.phases if phase.kind != "dense")
    ranks = "the ranks that the schedule gives" if written else f"rank ratio {RATIOS[0]:g}"
    raise ValueError(
        f"a budget of {budget:g} cannot be reached: with {ranks} and dense windows of one step "
        f"the run still takes {share(_shortened(plan, 0), RATIOS[0]):.3f} of the dense FLOPs. Raise the budget, or "
        "end in factored form: an adapter never takes less than 2/3 of its layer."
    )


def _saved(phase: Phase, layers: Sequence[Layer], config: DRTConfig) -> int:
    """FLOPs that one update step of a phase saves against dense."""
    return sum(
        2 * layer.rows * (flops_of(Dense(), layer.shape) - flops_of(form, layer.shape))
        for layer in layers
        for form in (resolve_form(phase.kind, layer.shape, config, layer.name, phase.rank),)
    )


def _shortened(plan: Plan, kept: float) -> Plan:
    """The plan with this share of each dense window, at least one step."""
    starts = [phase.start for phase in plan.phases]
    for index, phase in enumerate(plan.phases):
        if phase.kind != "dense":
            continue
        length = max(1, round(kept * (plan.end_of(index) - phase.start)))
        if index + 1 < len(plan):
            starts[index + 1] = phase.start + length
        else:
            starts[index] = plan.max_steps - length
    return Plan(tuple(replace(p, start=start) for p, start in zip(plan.phases, starts, strict=True)), plan.max_steps)
