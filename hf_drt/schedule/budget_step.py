"""What a budget decides of a plan: one rank, and one boundary."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_drt.schedule.boundary import Run
from hf_drt.schedule.dtypes import AUTO, DTYPES
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.plan import Plan

Rank = int | float | None
Form = tuple[str, Rank] | tuple[str, Rank, str | None]  # with the dtype where it has a price

RANKS = (1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32)
THROUGHOUT = tuple(k / 64 for k in range(16, 1, -1))  # where no full-rank phase can take what a rank leaves
FULL_RANK_SHARE = 0.1  # of the run, that a rank has to leave for full rank where the schedule has any


def budget_rank(kind: str, run: Run, full_rank: float, dense: float = 1.0) -> float:
    """The largest share of min(out, in) that leaves enough of the budget for full-rank phases.

    With steps that cost ``c`` in low rank and d (``dense``) in full rank, ``c (1 - w) + w d <= budget`` for the share
    ``w`` of the run in full rank, ``full_rank`` (:func:`full_rank_share`); among :data:`RANKS`, or
    :data:`THROUGHOUT` where that is 0.

    Raises:
        ValueError: There is no budget, or even the smallest of these ranks costs too much.
    """
    budget, cost = _budget_and_cost(run)
    within = [r for r in RANKS if _with_full_rank(cost(kind, r), full_rank, dense) <= budget]
    if not full_rank:
        largest = max((c for r in THROUGHOUT if (c := cost(kind, r)) <= budget), default=None)
        # Several may be rounded to the same ranks.
        within = sorted((r for r in THROUGHOUT if cost(kind, r) == largest), key=lambda r: r not in RANKS)
    if within:
        return within[0]
    beside = f", with {full_rank:.0%} of the run in full rank" if full_rank else ""
    raise ValueError(
        f"no rank meets a budget of {budget:g}: of the dense training FLOPs the {kind} form takes at least "
        f"{least_budget(kind, run, full_rank, dense):.3f}{beside}. Raise the budget, lower rank_multiple or "
        "rank_pattern, or write the schedule and its ranks by hand."
    )


def least_budget(kind: str, run: Run, full_rank: float, dense: float = 1.0) -> float:
    """The smallest budget for which :func:`budget_rank` finds a rank."""
    _, cost = _budget_and_cost(run)
    return _with_full_rank(cost(kind, RANKS[-1]), full_rank, dense)


def budget_rank_and_dtype(kind: str, run: Run, full_rank: float, dense: str) -> tuple[float, str]:
    """The largest share of min(out, in) that leaves enough of the budget for full-rank phases in any dtype; and, of the
    dtypes in which it does, the most exact.

    So precision is given up where that buys rank, and nowhere else. Steps cost their measured seconds
    (``run.seconds``), relative to dense ones in fp32; else as :func:`budget_rank`, in each of :data:`.DTYPES` by
    itself.

    Args:
        kind: Of the low-rank phases.
        run: With a budget and seconds.
        full_rank: Share of the run that is left for full rank.
        dense: Dtype of the phases in full rank; 'auto' where it is that of the low-rank phases.

    Raises:
        ValueError: There is no budget or no seconds, or even the smallest rank takes too many of them in every dtype.
    """
    seconds = _seconds(run)
    ranks: dict[str, float] = {}
    for dtype in DTYPES:
        try:
            ranks[dtype] = budget_rank(kind, in_dtype(run, dtype), full_rank, _dense_seconds(run, dense, dtype))
        except ValueError:  # of which the cheapest dtype tells below
            continue
    if not ranks:
        least = {dtype: least_seconds(kind, run, full_rank, dense, dtype) for dtype in DTYPES}
        shown = ", ".join(f"{value:.3f} in {dtype}" for dtype, value in least.items())
        dense_in = ", ".join(f"{seconds('dense', None, dtype):.3f} in {dtype}" for dtype in DTYPES)
        raise ValueError(
            f"no rank meets a budget of {run.budget:g} in any dtype: of the seconds of dense training in fp32, as "
            f"measured here, the {kind} form takes at least {shown} (dense {dense_in}). Raise the budget, lower "
            "rank_multiple or rank_pattern, or write ranks and dtypes by hand."
        )
    largest = max(ranks.values())
    return largest, next(dtype for dtype in DTYPES if ranks.get(dtype) == largest)


def least_seconds(kind: str, run: Run, full_rank: float, dense: str, dtype: str) -> float:
    """The smallest budget, of seconds, for which a rank is found in a dtype."""
    return least_budget(kind, in_dtype(run, dtype), full_rank, _dense_seconds(run, dense, dtype))


def in_dtype(run: Run, dtype: str) -> Run:
    """The run, whose steps cost their seconds in a dtype."""
    seconds = _seconds(run)
    return replace(run, cost=lambda kind, rank: seconds(kind, rank, dtype))


def _dense_seconds(run: Run, dense: str, dtype: str) -> float:
    return _seconds(run)("dense", None, dtype if dense == AUTO else dense)


def _seconds(run: Run) -> Callable[[str, Rank, str], float]:
    if run.seconds is None:
        raise ValueError(
            "a dtype 'auto' needs seconds=, which gives the seconds of a step in a form and dtype relative to dense in "
            "fp32. Write fp32 or bf16, or let hf_drt measure them on a model (hf_drt.planning)."
        )
    return run.seconds


def full_rank_share(kinds: Sequence[str], run: Run) -> float:
    """Share of the run that a rank has to leave for full rank, 0 where no phase is dense; of a run of less than ten
    update steps a tenth is less than one."""
    return max(FULL_RANK_SHARE, 1 / run.max_steps) if "dense" in kinds else 0.0


def _with_full_rank(cost: float, share: float, dense: float) -> float:
    return cost * (1 - share) + share * dense if share else cost  # dense may take for ever


def budget_step(index: int, starts: Sequence[int | None], forms: Sequence[Form], run: Run) -> int:
    """The update step at which phase ``index`` starts, so that the plan's average cost is the run's budget.

    With ``c`` the cost of a step before the boundary and ``c'`` after it, both phases together in ``[s, e)``, and all
    others costing ``A``: ``A + (x - s) c + (e - x) c' = budget * max_steps``, solved for x and rounded to the cheaper
    side.

    Args:
        index: Of the phase, not the first.
        starts: Start of every other phase, in update steps.
        forms: Kind and rank of every phase; and its dtype, where the run's cost is one of it.
        run: With its length, its budget and the cost of a form.

    Raises:
        ValueError: There is no budget, both phases cost the same, or no boundary meets the budget; the message says
            which budgets could be met.
    """
    budget, cost = _budget_and_cost(run)
    costs = [cost(*form) for form in forms]
    before, after = costs[index - 1], costs[index]
    names = f"'{_text(forms[index - 1])}' and '{_text(forms[index])}'"
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
            f"no boundary between {names} meets a budget of {budget:g}: this schedule takes a share of dense training "
            f"{_unit(forms)} from {least:.3f} to {most:.3f}. Change the budget or a rank, or train longer."
        )
    return step


def check_cost(plan: Plan, forms: Sequence[Form], run: Run, full_rank: float) -> None:
    """Whether a plan whose ranks a budget has decided, with room for a share ``full_rank`` of the run in full rank,
    keeps within it: its boundaries may be given.

    Raises:
        ValueError: It does not.
    """
    budget, cost = _budget_and_cost(run)
    costs = [cost(*forms[i]) * (plan.end_of(i) - phase.start) for i, phase in enumerate(plan.phases)]
    if (share := sum(costs) / plan.max_steps) > budget + 1e-9:
        left = f"{full_rank:.0%}" if full_rank else "nothing"
        raise ValueError(
            f"rank 'budget' leaves {left} of the run for full rank, and '{plan}' takes {share:.3f} of dense training "
            f"{_unit(forms)}, more than the budget of {budget:g}. Put a boundary at 'budget' too, e.g. "
            "'lowrank:budget@0 dense@budget', which is the preset auto_late, or shorten the dense phases."
        )


def _text(form: Form) -> str:
    return form_text(*form) if len(form) == 3 else form_text(form[0], form[1])


def _unit(forms: Sequence[Form]) -> str:
    """What their cost is counted in."""
    return "seconds (in fp32)" if len(forms[0]) > 2 else "FLOPs"


def _budget_and_cost(run: Run) -> tuple[float, Callable[..., float]]:
    """Both, of a run that has them; else ValueError."""
    if run.budget is None or run.cost is None:
        raise ValueError(
            "a rank or boundary 'budget' needs budget=, a share of dense training FLOPs in (0, 1], and a model whose "
            "layers tell what a step costs."
        )
    return run.budget, run.cost
