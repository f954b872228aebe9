"""The picture of a task whose methods are tuned: loss and second metric against the seconds of training."""

import statistics

from labels import label
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import deviation
from tuned_tables import Row

COLOURS = {"muon": "#7a9e26", "dense": "#31688e"}  # by the beginning of a method's name
LOW_RANK = "#d55e00"
MOST = 12  # methods that can be labelled where they stand

Points = dict[str, tuple[float, list[float]]]  # of each method its seconds, and the metric by seed


def tuned_quality(name: str, rows: dict[str, Row], methods: list[str] | None = None) -> Figure | None:
    """Mean and standard deviation over the seeds against CPU seconds of one thread, by the pilot's steps; a method
    that was in no pilot is left out.

    Args:
        name: Of the task.
        rows: Of its methods.
        methods: Those that are shown; all if left out.
    """
    rows = {m: row for m, row in rows.items() if row.seconds is not None and (not methods or m in methods)}
    if not rows:
        return None
    if len(rows) > MOST:
        return _ranked(name, rows)
    panels: dict[str, Points] = {"loss": {m: (row.seconds, row.losses) for m, row in rows.items()}}
    for key in dict.fromkeys(key for row in rows.values() for key in row.others):
        panels[key] = {m: (row.seconds, row.others[key]) for m, row in rows.items() if key in row.others}
    figure = Figure(figsize=(4.6 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (metric, points) in zip(axes, panels.items(), strict=True):
        _draw(panel, points)
        panel.set_ylabel(metric.replace("_", " "))
    axes[0].set_title(name)
    figure.draw_without_rendering()  # settles the layout, on which the places of the labels depend
    for panel, points in zip(axes, panels.values(), strict=True):
        label(panel, {m: (seconds, statistics.fmean(values)) for m, (seconds, values) in points.items()})
    return figure


def _ranked(name: str, rows: dict[str, Row]) -> Figure:
    """The methods one below the other, the lowest loss on top, each with its seconds: of more than can be
    labelled where they stand."""
    order = sorted(rows, key=lambda method: -statistics.fmean(rows[method].losses))
    metrics = ["loss", *dict.fromkeys(key for row in rows.values() for key in row.others)]
    figure = Figure(figsize=(2.6 * len(metrics) + 4, 0.19 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(axes, metrics, strict=True):
        for place, method in enumerate(order):
            row = rows[method]
            if metric == "loss" or metric in row.others:
                values = row.metric(metric)
                panel.errorbar(statistics.fmean(values), place, xerr=deviation(values) or 0.0, fmt="o", markersize=4,
                               color=_colour(method), elinewidth=0.7, capsize=1.5)  # fmt: skip
        panel.set_xlabel(metric.replace("_", " "))
        panel.grid(color="#000000", alpha=0.08, linewidth=0.5)
    axes[0].set_yticks(range(len(order)), [f"{rows[m].label}  ({rows[m].seconds:.0f} s)" for m in order])
    axes[0].set_title(name)
    return figure


def _colour(method: str) -> str:
    return next((colour for beginning, colour in COLOURS.items() if method.startswith(beginning)), LOW_RANK)


def _draw(panel: Axes, points: Points) -> None:
    for method, (seconds, values) in points.items():
        panel.errorbar(seconds, statistics.fmean(values), yerr=deviation(values) or 0.0, fmt="o", color=_colour(method),
                       elinewidth=0.7, capsize=1.5)  # fmt: skip
    panel.set_xlabel("CPU seconds")
    panel.margins(0.16, 0.12)
    panel.grid(color="#000000", alpha=0.08, linewidth=0.5)
