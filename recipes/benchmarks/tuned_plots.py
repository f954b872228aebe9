"""The picture of a task whose methods are tuned: loss and second metric against the seconds of training."""

import statistics

from labels import label
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import deviation
from tuned_tables import Row

COLOURS = {"muon": "#7a9e26", "dense": "#31688e"}  # by the beginning of a method's name
LOW_RANK = "#d55e00"

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


def _draw(panel: Axes, points: Points) -> None:
    for method, (seconds, values) in points.items():
        colour = next((c for beginning, c in COLOURS.items() if method.startswith(beginning)), LOW_RANK)
        panel.errorbar(seconds, statistics.fmean(values), yerr=deviation(values) or 0.0, fmt="o", color=colour,
                       elinewidth=0.7, capsize=1.5)  # fmt: skip
    panel.set_xlabel("CPU seconds")
    panel.margins(0.16, 0.12)
    panel.grid(color="#000000", alpha=0.08, linewidth=0.5)
