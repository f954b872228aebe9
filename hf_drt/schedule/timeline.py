"""Phases of a run over its update steps, as a line of text and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from hf_drt.schedule.parts import Group
from hf_drt.schedule.plan import Phase, Plan
from hf_drt.schedule.turns import provisional

COLOURS = {
    "dense": "#31688e", "factored": "#fd9a44", "adapter": "#8fb339", "frozen": "#a5afba", "mixed": "#7a6fae",
}  # fmt: skip
BLOCKS = {"dense": "█", "factored": "░", "adapter": "▒", "frozen": "▁", "mixed": "▓"}
LETTERS = {"dense": "#", "factored": ".", "adapter": "+", "frozen": "-", "mixed": "~"}  # where only plain text may go


class Span(Protocol):
    """A phase of form ``kind`` over the update steps ``[start, end)``."""

    @property
    def kind(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class FormSpan:
    """A :class:`Span` of a plan, or of one of its groups."""

    kind: str
    start: int
    end: int


def spans(plan: Plan) -> dict[str, list[FormSpan]]:
    """The forms of a plan over its update steps: of all layers, under '', or where groups of one division change form,
    of each group, as ``group 1/8``. Where the run decides whose turn it is, groups have theirs in ascending order."""
    phases = provisional(plan).phases
    divisions = {part.group.of for phase in phases for part in phase.parts if part.group is not None}
    if len(divisions) != 1:
        return {"": _merged([FormSpan(p.kind, p.start, plan.end_of(i)) for i, p in enumerate(phases)])}
    (count,) = divisions
    groups = (Group(number, count) for number in range(1, count + 1))
    return {f"group {group}": _spans_of(plan, phases, group) for group in groups}


def _spans_of(plan: Plan, phases: Sequence[Phase], group: Group) -> list[FormSpan]:
    kind, found = "", []
    for index, phase in enumerate(phases):
        kind = next((part.kind for part in phase.whole if part.group in (None, group)), kind)
        found.append(FormSpan(kind, phase.start, plan.end_of(index)))
    return _merged(found)


def _merged(found: list[FormSpan]) -> list[FormSpan]:
    """Neighbours of one kind as one."""
    merged = found[:1]
    for span in found[1:]:
        if span.kind == merged[-1].kind:
            merged[-1] = replace(merged[-1], end=span.end)
        else:
            merged.append(span)
    return merged


def timelines(rows: Mapping[str, Sequence[Span]], width: int = 60, marks: dict[str, str] = BLOCKS) -> str:
    """A run as lines of text: one, under '', or one per group (:func:`spans`); with a legend of the forms in it."""
    if len(rows) == 1:
        return timeline(rows[""], width, marks)
    wide, end = max(map(len, rows)), next(iter(rows.values()))[-1].end
    lines = [f"{name:<{wide}}  {_bar(row, width, marks)}" for name, row in rows.items()]
    kinds = dict.fromkeys(span.kind for row in rows.values() for span in row)
    return "\n".join([*lines, f"{_legend(kinds, marks)}  over {end} update steps"])


def timeline(phases: Sequence[Span], width: int = 60, marks: dict[str, str] = BLOCKS) -> str:
    """The run as a line of text, each phase at least one character wide, with a legend of the forms in it."""
    kinds = dict.fromkeys(phase.kind for phase in phases)
    return f"{_bar(phases, width, marks)}  {phases[-1].end} update steps\n{_legend(kinds, marks)}"


def _bar(phases: Sequence[Span], width: int, marks: dict[str, str]) -> str:
    """Up to the end of each phase; where they are as wide as they are long, the bars of groups meet."""
    total, bar = phases[-1].end, ""
    for phase in phases:
        bar += marks[phase.kind] * max(1, round(width * phase.end / total) - len(bar))
    return bar


def _legend(kinds: Iterable[str], marks: dict[str, str]) -> str:
    return "  ".join(f"{marks[kind]} {kind}" for kind in kinds)


def draw_timeline(rows: Mapping[str, Sequence[Span]], path: str | Path) -> bool:
    """Write a picture of phases over update steps, as :func:`timelines`; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    end = next(iter(rows.values()))[-1].end
    for place, phases in enumerate(rows.values()):
        for phase in phases:
            axes.barh(place, phase.end - phase.start, left=phase.start, color=COLOURS[phase.kind], edgecolor="white")
            if phase.end - phase.start > end / 12:
                axes.text((phase.start + phase.end) / 2, place, phase.kind, ha="center", va="center", color="white")
    axes.set(xlim=(0, end), xlabel="update step")
    axes.set_yticks(range(len(rows)) if len(rows) > 1 else [], rows if len(rows) > 1 else [])
    axes.invert_yaxis()
    axes.spines[["top", "left", "right"]].set_visible(False)
    figure.savefig(Path(path), dpi=150)
    return True
