"""Whose turn of full rank it is, where the run decides: the group that needs it most, by what was seen just before."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hf_drt.schedule.parts import LAST, NEXT, Group, Part
from hf_drt.schedule.plan import Phase, Plan

Needs = Mapping[int, float]  # of every group, by its number


class Turns:
    """Fills in the groups of a plan as their turns come.

    Decisions follow from what was measured alone, so that all processes, and a resumed run, make the same.

    Attributes:
        trace: One row per decision: ``step`` and ``phase``, ``needs`` of every group by its number as text, and the
            ``group`` that was chosen: of those whose turn has not come in this round the one with the greatest need, of
            equals the first.
        reference: What the needs are measured against, by layer, from when the run began.
    """

    def __init__(self) -> None:
        self.trace: list[dict[str, Any]] = []
        self.reference: dict[str, float] = {}

    def decide(self, plan: Plan, index: int, needs: Callable[[int], Needs]) -> Plan:
        """The plan with the groups of phase ``index`` decided, where they are not.

        Args:
            plan: All earlier phases of which are decided.
            index: Of the phase that is about to begin.
            needs: Gives the needs of all groups of a division into so many.
        """
        group = _undecided(plan.phases[index])
        if group is None:
            return plan
        if group.number == LAST:  # which follows
            return _filled(plan, index)
        seen = needs(group.of)
        number = max(candidates(plan, index, group), key=lambda number: (seen[number], -number))
        row = {"step": plan.phases[index].start, "phase": index, "group": number}
        self.trace.append(row | {"needs": {str(key): value for key, value in seen.items()}})
        return _filled(plan, index, number)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-serialisable."""
        return {"trace": list(self.trace), "reference": dict(self.reference)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.trace = list(state.get("trace", []))
        self.reference = dict(state.get("reference", {}))


def candidates(plan: Plan, index: int, group: Group) -> list[int]:
    """The groups whose turn may come with a phase: those that have had none in this round, and not that of the turn
    before where the same phase gives it another form. There is one: that of the turn before is left only where a round
    begins."""
    turns = _turns(plan, index, group.of)
    round_begun = len(turns) // group.of * group.of
    left = [number for number in range(1, group.of + 1) if number not in turns[round_begun:]]
    named = {part.group.number for part in plan.phases[index].parts if part.group is not None}
    return [number for number in left if LAST not in named or number != turns[-1]]


def provisional(plan: Plan) -> Plan:
    """The plan as if groups had their turns in ascending order, where the run decides."""
    for index, phase in enumerate(plan.phases):
        if (group := _undecided(phase)) is not None:
            number = candidates(plan, index, group)[0] if group.number == NEXT else None
            plan = _filled(plan, index, number)
    return plan


def could_become(plan: Plan, other: Plan) -> bool:
    """Whether ``other`` is the plan with groups decided, or with none."""
    pairs = list(zip(plan.phases, other.phases, strict=False))
    return len(plan) == len(other) and plan.max_steps == other.max_steps and all(_alike(*pair) for pair in pairs)


def _alike(one: Phase, other: Phase) -> bool:
    if len(one.parts) != len(other.parts):
        return False
    undecided = [
        part.group is not None and decided.group is not None and not part.group.decided
        and part.group.of == decided.group.of
        for part, decided in zip(one.parts, other.parts, strict=True)
    ]  # fmt: skip
    parts = tuple(
        replace(decided, group=part.group) if free else decided
        for part, decided, free in zip(one.parts, other.parts, undecided, strict=True)
    )
    return one == replace(other, parts=parts)


def _undecided(phase: Phase) -> Group | None:
    """The group of a phase whose turn it is to be; that of the turn before follows from it."""
    groups = [part.group for part in phase.parts if part.group is not None and not part.group.decided]
    return next((group for group in groups if group.number == NEXT), groups[0] if groups else None)


def _filled(plan: Plan, index: int, number: int | None = None) -> Plan:
    """The plan with ``number`` for 'next', and that of the turn before for 'last', in one of its phases."""
    phase = plan.phases[index]
    of = next(part.group.of for part in phase.parts if part.group is not None)
    decided = {NEXT: number, LAST: next(iter(_turns(plan, index, of)[::-1]), None)}
    parts = tuple(_with_number(part, decided) for part in phase.parts)
    return replace(plan, phases=(*plan.phases[:index], replace(phase, parts=parts), *plan.phases[index + 1 :]))


def _with_number(part: Part, decided: Mapping[str, int | None]) -> Part:
    if part.group is None or isinstance(part.group.number, int):
        return part
    number = decided[part.group.number]
    return part if number is None else replace(part, group=Group(number, part.group.of))


def _turns(plan: Plan, index: int, of: int) -> list[int]:
    """The numbers of the groups, of a division into ``of``, that phases before one have brought to full rank."""
    parts = [part for phase in plan.phases[:index] for part in phase.parts if part.kind == "dense"]
    groups = [part.group for part in parts if part.group is not None and part.group.of == of]
    return [group.number for group in groups if isinstance(group.number, int)]
