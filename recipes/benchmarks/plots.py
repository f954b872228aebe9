"""Pictures of a task from its records: quality against cost, loss and effective rank over time, quality over a grid.

Needs ``matplotlib`` (extra ``report``).
"""

import math
import statistics
from pathlib import Path
from typing import Any

from grids import method_name, pairs
from labels import label
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import record_of
from store import Store, task_file
from tables import deviation, metric
from tuned_plots import tuned_quality
from tuned_tables import rows_of

from hf_drt.report.figures import STYLE

FORMS = {"factored": "#f0862b", "dense": "#31688e", "adapter": "#7a9e26", "mixed": "#8a6fb0", "frozen": "#707070"}
Records = dict[str, list[dict[str, Any]]]


def write_plots(
    name: str, store: Store, seeds: list[int], folder: Path, methods: list[str] | None = None
) -> list[Path]:
    """Write the pictures of a task as PNG.

    Args:
        name: Of the task.
        store: Its records.
        seeds: Which of them.
        folder: Is made if it is not there.
        methods: Of the task; all but those of a grid and the trials of learning rates if left out.

    Raises:
        ValueError: There is no record.
    """
    task = task_file(name)
    found = {m: [r for s in seeds if (r := record_of(name, m, s, store))] for m in task["methods"]}
    found = {method: records for method, records in found.items() if records}
    if not found:
        raise ValueError(f"{store.path} has no record of {name} with seeds {seeds}. Make some: benchmark.py run {name}")
    left_out = {method_name(g, *pair) for g, section in task.get("grid", {}).items() for pair in pairs(section)}
    left_out |= {method for method, change in task["methods"].items() if "trial" in change}
    shown = {m: r for m, r in found.items() if (m in methods if methods else m not in left_out)}
    written = []
    with rc_context(STYLE):
        points = tuned_quality(name, rows_of(name, store, seeds), methods) if "tuned" in task else quality(name, shown)
        figures = {"quality": points, "curve": loss_over_time(name, shown), "rank": rank_over_time(name, shown)}
        figures |= {g: heat_map(name, g, section, found) for g, section in task.get("grid", {}).items()}
        folder.mkdir(parents=True, exist_ok=True)
        for kind, figure in figures.items():
            if figure is not None:
                written.append(folder / f"{name}-{kind}.png")
                figure.savefig(written[-1])
    return written


# ---- quality against cost


def quality(name: str, found: Records) -> Figure | None:
    """Mean and standard deviation over the seeds, against CPU seconds and FLOPs; the band is dense's."""
    if not found:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, unit in zip(panels, ("cpu_seconds", "flops"), ("CPU seconds", "FLOPs"), strict=True):
        points = {}
        for method, records in found.items():
            x, y = (statistics.fmean(r[k] for r in records) for k in (key, "value"))
            spread = deviation([r["value"] for r in records]) or 0.0
            panel.errorbar(x, y, yerr=spread, fmt="o", color=FORMS["dense"] if method == "dense" else "#d55e00",
                           elinewidth=0.7, capsize=1.5)  # fmt: skip
            points[method] = (x, y)
            if method == "dense":
                panel.axhspan(y - spread, y + spread, color=FORMS["dense"], alpha=0.12, linewidth=0)
                panel.axhline(y, color=FORMS["dense"], linewidth=0.6, linestyle="--")
        panel.set_xlabel(unit)
        panel.margins(0.16, 0.12)
        panel.grid(color="#000000", alpha=0.08, linewidth=0.5)
    panels[0].set_ylabel(metric(name))
    panels[0].set_title(name)
    figure.draw_without_rendering()  # settles the layout, on which the places of the labels depend
    for panel, key in zip(panels, ("cpu_seconds", "flops"), strict=True):
        label(panel, {m: (statistics.fmean(r[key] for r in rs), statistics.fmean(r["value"] for r in rs))
                       for m, rs in found.items()})  # fmt: skip
    return figure


# ---- loss over time

DRAWN = 10  # points that a curve needs


def loss_over_time(name: str, found: Records) -> Figure | None:
    """The evaluated loss of the first seed against CPU seconds, all methods in one panel; of tasks whose runs are
    evaluated often."""
    runs = {m: records[0] for m, records in found.items() if len(records[0]["curve"]) >= DRAWN}
    if not runs:
        return None
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    panel = figure.subplots()
    methods = task_file(name)["methods"]
    for method, record in runs.items():
        points = [(point["cpu_seconds"], point["loss"]) for point in record["curve"]]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=2, label=methods[method].get("label", method))
    ends = [record["curve"][-1]["loss"] for record in runs.values()]
    middles = [record["curve"][len(record["curve"]) // 3]["loss"] for record in runs.values()]
    panel.set_ylim(min(ends) - 0.05 * min(ends), max(middles))  # what comes before tells the methods apart less
    panel.set_xlabel("CPU seconds")
    panel.set_ylabel("loss")
    panel.set_title(name)
    panel.grid(color="#000000", alpha=0.08, linewidth=0.5)
    panel.legend()
    return figure


# ---- effective rank over time


def rank_over_time(name: str, found: Records) -> Figure | None:
    """One panel per method: effective rank, mean of the layers, of the first seed, on its phases; dense in grey."""
    runs = {m: records[0] for m, records in found.items() if records[0]["curve"][-1]["effective_rank"] is not None}
    if not runs:
        return None
    longest = max(r["cpu_seconds"] for r in runs.values())
    columns = min(4, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.4, 1.5 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (method, record) in zip(panels, runs.items(), strict=False):
        start = 0.0
        for phase in record["phases"]:
            end = start + phase["cpu_seconds"]
            panel.axvspan(start, end, color=FORMS[phase["kind"]], alpha=0.22, linewidth=0)
            start = end
        if method != "dense" and "dense" in runs:
            _curve(panel, runs["dense"], color="#909090", linewidth=0.8)
        _curve(panel, record, color="black", marker="o", markersize=2.5)
        panel.set_title(method)
        panel.set_xlim(0, longest)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    kinds = [kind for kind in FORMS if any(phase["kind"] == kind for r in runs.values() for phase in r["phases"])]
    keys = [figure.axes[0].fill([], [], color=FORMS[kind], alpha=0.3)[0] for kind in kinds]
    figure.legend(keys, kinds, loc="outside lower center", ncols=len(kinds))
    for panel in panels[max(0, len(runs) - columns) : len(runs)]:
        panel.set_xlabel("CPU seconds")
        panel.tick_params(labelbottom=True)
    figure.supylabel(f"effective rank, {name}", fontsize=8)
    return figure


def _curve(panel: Axes, record: dict[str, Any], **style: Any) -> None:
    points = [(point["cpu_seconds"], point["effective_rank"]) for point in record["curve"]]
    panel.plot(*zip(*points, strict=True), **style)


# ---- windows


def heat_map(name: str, grid: str, section: dict[str, Any], found: Records) -> Figure | None:
    """Mean quality by begin I and end D of the full-rank window, with the standard deviation beneath."""
    cells = {pair: found[m] for pair in pairs(section) if (m := method_name(grid, *pair)) in found}
    if not cells:
        return None
    means = {pair: statistics.fmean(r["value"] for r in records) for pair, records in cells.items()}
    values = [[means.get((low, high), math.nan) for low in section["I"]] for high in section["D"]]
    figure = Figure(figsize=(0.95 * len(section["I"]) + 1.6, 0.62 * len(section["D"]) + 1.3), layout="constrained")
    panel = figure.subplots()
    best_is_high = metric(name) == "accuracy"
    image = panel.imshow(values, origin="lower", aspect="auto", cmap="viridis" if best_is_high else "viridis_r")
    for (low, high), mean in means.items():
        spread = deviation([r["value"] for r in cells[low, high]])
        text = f"{mean:.4f}" + (f"\n±{spread:.4f}" if spread is not None else "")
        shade = sum(c * w for c, w in zip(image.cmap(image.norm(mean))[:3], (0.3, 0.59, 0.11), strict=True))
        column, row = section["I"].index(low), section["D"].index(high)
        panel.text(column, row, text, ha="center", va="center", fontsize=6.5, color="black" if shade > 0.5 else "white")
    panel.set_xticks(range(len(section["I"])), section["I"])
    panel.set_yticks(range(len(section["D"])), section["D"])
    panel.set_xlabel("full rank from, % of the run")
    panel.set_ylabel("to, %")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    others = (f"{m} {statistics.fmean(r['value'] for r in found[m]):.4f}" for m in ("dense", "fixed") if m in found)
    heading = f"{name}: {section['before']}, dense, {section['after']}; {metric(name)}"
    panel.set_title("\n".join(filter(None, (heading, ", ".join(others)))))
    figure.colorbar(image, aspect=30, pad=0.02).outline.set_visible(False)
    return figure
