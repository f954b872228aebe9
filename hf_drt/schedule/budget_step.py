"""What a budget decides of a plan: one rank, and one boundary."""

import math
from collections.abc import Callable, Sequence

from hf_drt.schedule.boundary import Run
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.plan import Plan

Form = tuple[str, int | float | None]

RANKS = (1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32)
THROUGHOUT = tuple(k / 64 for k in range(16, 1, -1))  # where no full-rank phase can take what a rank leaves
FULL_RANK_SHARE = 0.1  # of the run, that a rank has to leave for full rank where the schedule has any


def budget_rank(kind: str, run: Run, full_rank: float) -> float:
    """The largest share of min(out, in) that leaves enough of the budget for full-rank phases.

    With steps that cost ``c`` in low rank and 1 in full rank, ``c (1 - w) + w <= budget`` for the share ``w`` of the
    run in full rank, ``full_rank`` (:func:`full_rank_share`); among :data:`RANKS`, or
    :data:`THROUGHOUT` where that is 0.

    Raises:
        ValueError: There is no budget, or even the smallest of these ranks costs too much.
    """
    budget, cost = _budget_and_cost(run)
    within = [r for r in RANKS if _with_full_rank(cost(kind, r), full_rank) <= budget]
    if not full_rank:
        largest = max((c for r in THROUGHOUT if (c := cost(kind, r)) <= budget), default=None)
        # Several may be rounded to the same ranks.
        within = sorted((r for r in THROUGHOUT if cost(kind, r) == largest), key=lambda r: r not in RANKS)
    if within:
        return within[0]
    beside = f", with {full_rank:.0%} of the run in full rank" if full_rank else ""
    raise ValueError(
        f"no rank meets a budget of {budget:g}: of the dense training FLOPs the {kind} form takes at least "
        f"{least_budget(kind, run, full_rank):.3f}{beside}. Raise the budget, lower rank_multiple or rank_pattern, or "
        "write the schedule and its ranks by hand."
    )


def least_budget(kind: str, run: Run, full_rank: float) -> float:
    """The smallest budget for which :func:`budget_rank` finds a rank."""
    _, cost = _budget_and_cost(run)
    return _with_full_rank(cost(kind, RANKS[-1]), full_rank)


def full_rank_share(kinds: Sequence[str], run: Run) -> float:
    """Share of the run that a rank has to leave for full rank, 0 where no phase is dense; of a run of less than ten
    update steps a tenth is less than one."""
    return max(FULL_RANK_SHARE, 1 / run.max_steps) if "dense" in kinds else 0.0


def _with_full_rank(cost: float, share: float) -> float:
    return cost * (1 - share) + share


def budget_step(index: int, starts: Sequence[int | None], forms: Sequence[Form], run: Run) -> int:
    """The update step at which phase ``index`` starts, so that the plan's average cost is the run's budget.

    With ``c`` the cost of a step before the boundary and ``c'`` after it, both phases together in ``[s, e)``, and all
    others costing ``A``: ``A + (x - s) c + (e - x) c' = budget * max_steps``, solved for x and rounded to the cheaper
    side.

    Args:
        index: Of the phase, not the first.
        starts: Start of every other phase, in update steps.
        forms: Kind and rank of every phase.
        run: With its length, its budget and the cost of a form.

    Raises:
        ValueError: There is no budget, both phases cost the same, or no boundary meets the budget; the message says
            which budgets could be met.
    """
    budget, cost = _budget_and_cost(run)
    costs = [cost(*form) for form in forms]
    before, after = costs[index - 1], costs[index]
    names = f"'{form_text(*forms[index - 1])}' and '{form_text(*forms[index])}'"
    if before == after:
        raise ValueError(f"{names} cost the same, so that no boundary between them is decided by a budget.")
    given = [0 if start is None else start for start in starts]  # in place of the one that is sought, and not read
    ends = [*given[1:], run.max_steps]
    start, end = given[index - 1], ends[index]
    others = sum(c * (ends[i] - given[i]) for i, c in enumerate(costs) if i not in (index - 1, index))
    exact = (budget * run.max_steps - others + start * before - end * after) / (before - after)
    # A boundary that is off by less than float's rounding is no dearer.
    step = math.ceil(exact - 1e-9) if before < after else math.floor(exact + 1e-9)
    if end - start < 2:
        raise ValueError(
            f"there is no boundary between {names}: both together have {max(end - start, 0)} of {run.max_steps} update "
            "steps. Train for more steps."
        )
    if not start < step < end:
        nearest = ((others + (x - start) * before + (end - x) * after) / run.max_steps for x in (start + 1, end - 1))
        least, most = sorted(nearest)
        raise ValueError(
            f"no boundary between {names} meets a budget of {budget:g}: this schedule takes a share of "
            f"dense training FLOPs from {least:.3f} to {most:.3f}. Change the budget or a rank, or train longer."
        )
    return step


def check_cost(plan: Plan, run: Run, full_rank: float) -> None:
    """Whether a plan whose ranks a budget has decided, with room for a share ``full_rank`` of the run in full rank,
    keeps within it: its boundaries may be given.

    Raises:
        ValueError: It does not.
    """
    budget, cost = _budget_and_cost(run)
    costs = [cost(phase.kind, phase.rank) * (plan.end_of(i) - phase.start) for i, phase in enumerate(plan.phases)]
    if (share := sum(costs) / plan.max_steps) > budget + 1e-9:
        left = f"{full_rank:.0%}" if full_rank else "nothing"
        raise ValueError(
            f"rank 'budget' leaves {left} of the run for full rank, and '{plan}' takes "
            f"{share:.3f} of dense training FLOPs, more than the budget of {budget:g}. Put a boundary at 'budget' too, "
            "e.g. 'lowrank:budget@0 dense@budget', which is the preset auto_late, or shorten the dense phases."
        )


def _budget_and_cost(run: Run) -> tuple[float, Callable[[str, int | float | None], float]]:
    """Both, of a run that has them; else ValueError."""
    if run.budget is None or run.cost is None:
        raise ValueError(
            "a rank or boundary 'budget' needs budget=, a share of dense training FLOPs in (0, 1], and a model whose "
            "layers tell what a step costs."
        )
    return run.budget, run.cost
