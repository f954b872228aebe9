"""Phases of a run over its update steps, as a line of text and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

COLOURS = {"dense": "#31688e", "factored": "#fd9a44", "adapter": "#8fb339"}
BLOCKS = {"dense": "█", "factored": "░", "adapter": "▒"}
LETTERS = {"dense": "#", "factored": ".", "adapter": "+"}  # where only plain text may go


class Span(Protocol):
    """A phase of form ``kind`` over the update steps ``[start, end)``."""

    @property
    def kind(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


def timeline(phases: Sequence[Span], width: int = 60, marks: dict[str, str] = BLOCKS) -> str:
    """The run as a line of text, each phase at least one character wide, with a legend of the forms in it."""
    total = phases[-1].end
    bar = "".join(marks[p.kind] * max(1, round(width * (p.end - p.start) / total)) for p in phases)
    legend = "  ".join(f"{marks[kind]} {kind}" for kind in dict.fromkeys(p.kind for p in phases))
    return f"{bar}  {total} update steps\n{legend}"


def draw_timeline(phases: Sequence[Span], path: str | Path) -> bool:
    """Write a picture of the phases over update steps; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 1.4), layout="constrained")
    axes = figure.subplots()
    for phase in phases:
        axes.barh(0, phase.end - phase.start, left=phase.start, color=COLOURS[phase.kind], edgecolor="white")
        if phase.end - phase.start > phases[-1].end / 12:
            axes.text((phase.start + phase.end) / 2, 0, phase.kind, ha="center", va="center", color="white")
    axes.set(xlim=(0, phases[-1].end), yticks=[], xlabel="update step")
    axes.spines[["top", "left", "right"]].set_visible(False)
    figure.savefig(Path(path), dpi=150)
    return True
