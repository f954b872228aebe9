"""Pictures of runs for papers, as PNG and SVG: curves over steps and seconds, effective rank, phases, switches.

Needs ``matplotlib`` (extra ``report``).
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_drt.report.page import curve_names
from hf_drt.report.run_data import PhaseData, RankMap, RunData, common_prefix
from hf_drt.report.tables import title

FORMATS = ("png", "svg")
_COLOURS = ("#0072b2", "#d55e00", "#008060", "#a8428a", "#7a6400", "#3b3f45")
_MARKERS = ("o", "s", "^", "D")
_FORMS = {
    "factored": "#f0862b", "dense": "#31688e", "adapter": "#7a9e26", "frozen": "#a5afba", "mixed": "#7a6fae",
    "unknown": "#808080",
}  # fmt: skip
_UNITS = {"steps": "update steps", "seconds": "seconds of training"}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#707880",
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "hf_drt",
    "text.parse_math": False,
}


def write_figures(runs: Sequence[RunData], folder: str | os.PathLike) -> list[Path]:
    """Write the pictures of the runs, each as PNG (200 dpi, 7 inches wide) and SVG.

    Args:
        runs: From :func:`hf_drt.report.read_runs`.
        folder: Is made if it is not there; pictures of the same names are written over.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(STYLE):
        for name, figure in draw_figures(runs):
            for suffix in FORMATS:
                written.append(folder / f"{name}.{suffix}")
                figure.savefig(written[-1], metadata={"Date": None} if suffix == "svg" else None)
    return written


def draw_figures(runs: Sequence[RunData]) -> Iterator[tuple[str, Figure]]:
    """The pictures and their names, one at a time; :func:`write_figures` sets their style."""
    for name in curve_names(runs):
        yield f"curve-{_slug(name)}", _curve(runs, name, title(name) if name != "loss" else "training loss")
    if any("drt_effective_rank_mean" in run.series for run in runs):
        yield "effective-rank", _curve(runs, "drt_effective_rank_mean", "effective rank, mean and lowest of the layers")
    ranked = [(run, run.ranks) for run in runs if run.ranks]
    names = [_slug(run.name) for run, _ in ranked]
    limits = _rank_limits([ranks for _, ranks in ranked])
    for index, ((run, ranks), name) in enumerate(zip(ranked, names, strict=True)):
        twin = f"-{index}" if names.count(name) > 1 else ""
        yield f"effective-rank-{name}{twin}", _heat_map(run, ranks, limits)
    grouped = [run for run in runs if run.groups]
    for index, run in enumerate(grouped):
        twin = f"-{index}" if len(grouped) > 1 else ""
        yield f"groups{twin}", _groups(run)
    changing = [(index, run) for index, run in enumerate(runs) if run.changes]
    if changing:
        yield "phases", _phase_bars(changing)
        yield "switches", _switch_bars(changing)


def _slug(text: str) -> str:
    """A part of a file's name: letters, digits and dashes only."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-").lower()[:60] or "run"


# ---- curves


def _curve(runs: Sequence[RunData], name: str, heading: str) -> Figure:
    """One curve of all runs, over steps and, where a run has them, over seconds."""
    axis_names = [axis for axis in _UNITS if axis == "steps" or any(run.clock.total is not None for run in runs)]
    strips = sum(run.changes for run in runs)
    figure = Figure(figsize=(7, 2.5 + 0.1 * strips), layout="constrained")
    panels = figure.subplots(1, len(axis_names), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axis_names, strict=True):
        for index, run in enumerate(runs):
            _line(panel, run, index, name, axis)
            if name == "drt_effective_rank_mean":
                _line(panel, run, index, "drt_effective_rank_min", axis, thin=True)
        panel.set_xlabel(_UNITS[axis])
        panel.set_xlim(left=0)
        panel.margins(y=0.12)
        panel.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.6)
        _shade(panel, runs, axis)
    panels[0].set_title(heading, pad=6 + 5.2 * strips if strips > 1 else 5)
    if len(runs) > 1:
        _legend(figure, panels[0], runs, strips > 1)
    return figure


def _legend(figure: Figure, panel: Axes, runs: Sequence[RunData], forms: bool) -> None:
    """The runs in the first row and, where strips need them, the forms in the second."""
    rows: list[list[tuple[Artist, str]]] = [[(line, name) for line in panel.lines if (name := line.get_gid())]]
    if forms:
        kinds = dict.fromkeys(phase.kind or "unknown" for run in runs if run.changes for phase in run.phases)
        rows.append([(Patch(**_form_style(kind), alpha=0.65, linewidth=0), kind) for kind in kinds])
    columns = min(6, max(map(len, rows)))
    blank: tuple[Artist, str] = (Patch(alpha=0), "")
    rows = [row + [blank] * (-len(row) % columns) for row in rows]
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    entries = [line[column] for column in range(columns) for line in lines]  # a legend is filled column by column
    figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=columns)


def _line(panel: Axes, run: RunData, index: int, name: str, axis: str, thin: bool = False) -> None:
    points = [p for p in run.series.get(name, ()) if math.isfinite(p.value)]
    xs = [p.step if axis == "steps" else p.seconds for p in points]
    known = [(x, p.value) for x, p in zip(xs, points, strict=True) if x is not None]
    style: dict[str, Any] = {"linestyle": "--", "linewidth": 0.8} if thin else _marker(index)
    every = max(1, len(known) // 8)
    (line,) = panel.plot(
        [x for x, _ in known],
        [y for _, y in known],
        color=_COLOURS[index % len(_COLOURS)],
        markevery=(index % len(_MARKERS) * every // len(_MARKERS), every),
        **style,
    )
    if known and not thin:
        line.set_gid(run.name)  # a label would not do: matplotlib leaves out those that begin with an underscore


def _marker(index: int) -> dict[str, Any]:
    return {"marker": _MARKERS[index % len(_MARKERS)], "markeredgecolor": "white", "markeredgewidth": 0.4}


def _shade(panel: Axes, runs: Sequence[RunData], axis: str) -> None:
    """The phases behind the curves, with their names, if one run has any; else as one strip per run above them."""
    changing = [(index, run) for index, run in enumerate(runs) if run.changes]
    alone = len(changing) == 1
    for row, (index, run) in enumerate(reversed(changing)):
        low, high = (0.0, 1.0) if alone else (1.02 + 0.05 * row, 1.06 + 0.05 * row)
        for phase in run.phases:
            start, end = _span(phase, axis)
            if start is None or end is None:
                continue
            look = {"alpha": 0.16} if alone else {"alpha": 0.65, "clip_on": False}
            panel.axvspan(start, end, low, high, **_form_style(phase.kind), linewidth=0, **look)
            panel.set_xlim(right=max(panel.get_xlim()[1], end))
            if alone and _fits(phase, (end - start) / panel.get_xlim()[1], inches=3.1):
                place = {"transform": panel.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 6.5}
                panel.text((start + end) / 2, 0.985, phase.label, color="#404850", **place)
        if not alone:
            style = {"color": _COLOURS[index % len(_COLOURS)], **_marker(index), "clip_on": False}
            panel.plot(-0.015, (low + high) / 2, transform=panel.transAxes, **style)


def _fits(phase: PhaseData, share: float, inches: float) -> bool:
    """Whether a phase that takes a share of a panel so wide has room for its name in 6.5 points."""
    return 0.055 * len(phase.label) < share * inches


def _span(phase: PhaseData, axis: str) -> tuple[float | None, float | None]:
    return (phase.start, phase.end) if axis == "steps" else (phase.begin, phase.finish)


def _form_style(kind: str | None) -> dict[str, Any]:
    kind = kind or "unknown"
    return {"facecolor": _FORMS[kind], "edgecolor": "white", "hatch": "////" if kind == "adapter" else None}


# ---- groups


def _groups(run: RunData) -> Figure:
    """The forms of each group of layers over update steps."""
    figure = Figure(figsize=(7, 0.9 + 0.2 * len(run.groups)), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(run.groups.values()):
        for span in row:
            panel.barh(place, span.end - span.start, left=span.start, height=0.8, **_form_style(span.kind), alpha=0.75,
                       linewidth=0)  # fmt: skip
    panel.set_yticks(range(len(run.groups)), list(run.groups))
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.set_xlim(0, run.max_steps)
    panel.set_xlabel(_UNITS["steps"])
    panel.set_title(run.name)
    kinds = dict.fromkeys(span.kind for row in run.groups.values() for span in row)
    patches = [Patch(**_form_style(kind), alpha=0.75, linewidth=0) for kind in kinds]
    figure.legend(patches, list(kinds), loc="outside lower center", ncols=len(kinds))
    return figure


# ---- effective rank, layer by time


def _rank_limits(ranks: Sequence[RankMap]) -> tuple[float, float]:
    """Lowest and highest value of all runs, so that their colours mean the same."""
    values = [value for one in ranks for row in one.values for value in row if value is not None]
    finite = [value for value in values if math.isfinite(value)]
    return min(finite, default=0.0), max(finite, default=1.0)


def _heat_map(run: RunData, ranks: RankMap, limits: tuple[float, float]) -> Figure:
    count = len(ranks.layers)
    figure = Figure(figsize=(7, min(1.1 + 0.13 * count, 9)), layout="constrained")
    panel = figure.subplots()
    values = [[math.nan if value is None else value for value in row] for row in ranks.values]
    edges = [0, *ranks.steps] if ranks.steps[0] > 0 else [-0.5, *ranks.steps]
    image = panel.pcolormesh(
        edges, range(count + 1), values, cmap="viridis", vmin=limits[0], vmax=limits[1], rasterized=True
    )
    every = math.ceil(count / 60)
    prefix = common_prefix(ranks.layers)
    names = [name.removeprefix(prefix) for name in ranks.layers]
    panel.set_yticks([row + 0.5 for row in range(0, count, every)], names[::every], fontsize=6)
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.set_xlabel(_UNITS["steps"])
    panel.set_title(f"effective rank, {run.name}" + (f", layers of {prefix}" if prefix else ""), pad=14)
    for phase in run.phases:
        if phase.start:
            panel.axvline(phase.start, color="white", linewidth=0.8, linestyle="--")
        if _fits(phase, (phase.end - phase.start) / edges[-1], inches=5.2):
            panel.text((phase.start + phase.end) / 2, -0.25, phase.label, ha="center", va="bottom", fontsize=6.5)
    panel.spines[:].set_visible(False)
    figure.colorbar(image, aspect=40, pad=0.01).outline.set_visible(False)
    return figure


# ---- bars


def _phase_bars(runs: Sequence[tuple[int, RunData]]) -> Figure:
    """What the phases cost: one bar per phase and run, in as many panels as there are numbers."""
    wanted = {
        "tokens_per_second": "tokens per second",
        "samples_per_second": "samples per second",
        "peak_memory": "peak memory, MiB",
        "seconds": "seconds",
    }
    if any(phase.tokens_per_second is not None for _, run in runs for phase in run.phases):
        del wanted["samples_per_second"]
    known = [name for name in wanted if any(getattr(p, name) is not None for _, run in runs for p in run.phases)]
    bars = [(run, phase) for _, run in runs for phase in run.phases]
    figure = Figure(figsize=(7, 0.9 + 0.19 * (len(bars) + len(runs))), layout="constrained")
    panels = figure.subplots(1, max(len(known), 1), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, known, strict=False):
        pattern = "{:,.1f}" if name == "seconds" else "{:,.0f}"
        _bars(panel, runs, [getattr(phase, name) for _, phase in bars], pattern)
        panel.set_title(wanted[name])
    _name_bars(panels[0], runs, [[phase.numbered for phase in run.phases] for _, run in runs])
    return figure


def _switch_bars(runs: Sequence[tuple[int, RunData]]) -> Figure:
    """What the changes of form took, and what they cost in precision."""
    wanted = {
        "seconds": "seconds of the switch",
        "truncation_error": "truncation error",
        "function_error": "function error",
    }
    bars = [switch for _, run in runs for switch in run.switches]
    figure = Figure(figsize=(7, 0.9 + 0.19 * (len(bars) + len(runs))), layout="constrained")
    panels = figure.subplots(1, len(wanted), sharey=True)
    for panel, (name, heading) in zip(panels, wanted.items(), strict=True):
        _bars(panel, runs, [getattr(switch, name) for switch in bars], "{:.2g}")
        panel.set_title(heading)
    labels = [[f"step {s.step} to {run.phases[i].label}" for i, s in enumerate(run.switches)] for _, run in runs]
    _name_bars(panels[0], runs, labels)
    return figure


def _places(runs: Sequence[tuple[int, RunData]]) -> list[list[int]]:
    """Height of every bar, by run; a line is left free above each run for its name."""
    places, free = [], 0
    for _, run in runs:
        places.append(list(range(free + 1, free + 1 + len(run.phases))))
        free += len(run.phases) + 1
    return places


def _bars(panel: Axes, runs: Sequence[tuple[int, RunData]], values: Sequence[float | None], pattern: str) -> None:
    places = [place for group in _places(runs) for place in group]
    kinds = [phase.kind for _, run in runs for phase in run.phases]
    for place, value, kind in zip(places, values, kinds, strict=True):
        length = value if value is not None and math.isfinite(value) else 0
        panel.barh(place, length, height=0.72, **_form_style(kind), alpha=0.75, linewidth=0)
        text = "–" if value is None else pattern.format(value)
        panel.annotate(text, (length, place), (3, 0), textcoords="offset points", va="center", size=7)
    panel.margins(x=0.22)
    panel.set_xlim(left=0)
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    panel.spines["bottom"].set_visible(False)


def _name_bars(panel: Axes, runs: Sequence[tuple[int, RunData]], labels: Sequence[Sequence[str]]) -> None:
    places = _places(runs)
    panel.set_yticks([place for group in places for place in group], [label for group in labels for label in group])
    panel.set_ylim(places[-1][-1] + 0.6, -0.6)
    for (index, run), group in zip(runs, places, strict=True):
        colour = _COLOURS[index % len(_COLOURS)]
        place = (0, group[0] - 1)
        panel.annotate(run.name, place, (4, 0), textcoords="offset points", va="center", color=colour, weight="bold")
