"""One HTML file: style, script and data inside, nothing fetched. All text of the runs is escaped.

Tables are plain HTML; the curves are drawn from JSON as SVG, by the scripts in ``assets``.
"""

import json
import math
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_drt.report.run_data import PhaseData, RankMap, RunData, Series, common_prefix
from hf_drt.report.tables import Cell, Row, Table, notes, overview, phase_table, switch_table

MOST_POINTS = 2000
"""Of a curve; a longer one is thinned to the lowest and the highest value of each stretch."""
MOST_COLUMNS = 300
"""Of a heat map; of more, evenly spaced ones are shown."""
_RANK_KEYS = ("drt_effective_rank_mean", "drt_effective_rank_min")
_FIRST_CURVES = ("loss", "eval_loss")
_LAST_CURVES = ("learning_rate", "grad_norm")
_SCRIPTS = ("elements.js", "plot.js", "curves.js", "heat_map.js", "page.js")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="muted">{lead}</p>
</header>
<div id="toolbar"></div>
<main>
<noscript><p>The curves are drawn by a script, which is switched off here. The tables are complete.</p></noscript>
{sections}
</main>
<footer>{footer}</footer>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def write_page(runs: Sequence[RunData], path: str | os.PathLike) -> Path:
    """Write the report of the runs, one HTML file that needs no network.

    Args:
        runs: From :func:`hf_drt.report.read_runs`.
        path: Of the file; folders above it are made.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs), encoding="utf-8")
    return path


def page(runs: Sequence[RunData]) -> str:
    """The report as HTML."""
    names = ", ".join(run.name for run in runs)
    return _PAGE.format(
        policy=_POLICY,
        title=escape(f"Training report: {names}" if len(names) <= 60 else f"Training report of {len(runs)} runs"),
        lead=escape(_summary(runs)),
        style=_asset("page.css"),
        script="\n".join(map(_asset, _SCRIPTS)),
        sections="\n".join(_sections(runs)),
        footer=_footer(),
        data=_json({"runs": [run_json(run) for run in runs], "curves": curve_names(runs)}),
    )


def curve_names(runs: Sequence[RunData]) -> list[str]:
    """The curves of a report, losses first; effective rank has a section of its own."""
    names = dict.fromkeys(name for run in runs for name in run.series if name not in _RANK_KEYS)
    evaluated = sorted(name for name in names if name.startswith("eval_"))
    order = [*_FIRST_CURVES, *evaluated, *(n for n in names if n not in _LAST_CURVES), *_LAST_CURVES]
    return [name for name in dict.fromkeys(order) if name in names]


def run_json(run: RunData) -> dict[str, Any]:
    """What the script needs of a run. Numbers that are none become null."""
    last = max((point.step for series in run.series.values() for point in series), default=run.step)
    return {
        "name": run.name,
        "timed": run.clock.total is not None,
        "end": {"steps": max(last, run.step), "seconds": run.clock.total},
        "phases": [_phase_json(phase) for phase in run.phases if run.changes],
        "series": {name: _series_json(thinned(series)) for name, series in run.series.items()},
        "ranks": _ranks_json(run.ranks) if run.ranks else None,
    }


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most ``most`` points of a curve and its last one: the lowest and the highest of each stretch, in order."""
    if len(series) <= most:
        return series
    size = math.ceil(2 * len(series) / most)
    kept = set()
    for start in range(0, len(series), size):
        stretch = range(start, min(start + size, len(series)))
        kept |= {min(stretch, key=lambda i: series[i].value), max(stretch, key=lambda i: series[i].value)}
    return tuple(series[i] for i in sorted(kept | {len(series) - 1}))


def _phase_json(phase: PhaseData) -> dict[str, Any]:
    return {
        "kind": phase.kind,
        "label": phase.label,
        "steps": [phase.start, phase.end],
        "seconds": [_finite(phase.begin), _finite(phase.finish)],
    }


def _series_json(series: Series) -> dict[str, list[float | None]]:
    return {
        "steps": [point.step for point in series],
        "seconds": [_finite(point.seconds) for point in series],
        "values": [_finite(point.value) for point in series],
    }


def _ranks_json(ranks: RankMap) -> dict[str, Any]:
    every = math.ceil(len(ranks.steps) / MOST_COLUMNS)
    columns = range(len(ranks.steps) - 1, -1, -every)[::-1]  # with the last one
    prefix = common_prefix(ranks.layers)
    return {
        "prefix": prefix,
        "layers": [name.removeprefix(prefix) for name in ranks.layers],
        "steps": [ranks.steps[i] for i in columns],
        "seconds": [_finite(ranks.seconds[i]) for i in columns],
        "values": [[_finite(row[i]) for i in columns] for row in ranks.values],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _json(data: Any) -> str:
    """JSON that no HTML parser takes for markup, nor a script for a line's end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return files("hf_drt.report").joinpath("assets", name).read_text(encoding="utf-8")


# ---- sections


def _summary(runs: Sequence[RunData]) -> str:
    changing = sum(run.changes for run in runs)
    if len(runs) == 1:
        return f"One run, {runs[0].step:,} update steps" + ("" if changing else ", without phases") + "."
    return f"{len(runs)} runs side by side, {changing} of them with phases."


def _sections(runs: Sequence[RunData]) -> list[str]:
    found = [f'<h2 id="overview">Overview</h2>\n<div class="card">{_overview(runs)}</div>']
    if remarks := _remarks(runs):
        found.append(f'<div class="card" id="notes">{remarks}</div>')
    found.append(f'<h2>Curves</h2>\n{_legend(runs)}<div class="charts" id="charts"></div>')
    if any(key in run.series for run in runs for key in _RANK_KEYS):
        found.append(f'<h2>Effective rank</h2>\n<div class="stack" id="rankcharts"></div>{_rank_hint(runs)}')
    if rows := "".join(_groups(index, run) for index, run in enumerate(runs) if run.groups):
        found.append(f'<h2>Groups</h2>\n{_legend_of(_group_forms(runs))}<div class="card" id="groups">{rows}</div>')
    for name, table in (("Phases", phase_table(runs)), ("Switches", switch_table(runs))):
        if table.groups:
            found.append(f'<h2>{name}</h2>\n<div class="card">{_grouped(runs, table, name.lower())}</div>')
    return found


def _group_forms(runs: Sequence[RunData]) -> list[str]:
    return list(dict.fromkeys(span.kind for run in runs for row in run.groups.values() for span in row))


def _groups(index: int, run: RunData) -> str:
    """The forms of each group of a run over its update steps, as bars."""
    rows = []
    for name, row in run.groups.items():
        bars = "".join(
            f'<i class="{span.kind}" style="width:{100 * (span.end - span.start) / row[-1].end:.3f}%" '
            f'title="{span.kind}, steps {span.start} to {span.end}"></i>'
            for span in row
        )
        told = ", ".join(f"{span.kind} from {span.start}" for span in row)
        rows.append(f'<span>{escape(name)}</span><div role="img" aria-label="{told}">{bars}</div>')
    return f'<h3>{_named(index, run)}</h3><div class="groups">{"".join(rows)}</div>'


def _overview(runs: Sequence[RunData]) -> str:
    head = "".join(f'<th scope="col">{_named(index, run)}</th>' for index, run in enumerate(runs))
    first, *rest = overview(runs)
    body = _row(first, "text") + "".join(map(_row, rest))
    # Phones show the runs in as many columns as fit under the name of each row.
    table = f'<table class="overview" style="--runs: {len(runs)}">'
    return _scroll(f"{table}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>")


def _grouped(runs: Sequence[RunData], table: Table, what: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    bodies = []
    for index, rows in table.groups.items():
        name = f'<th scope="rowgroup" colspan="{len(table.header)}">{_named(index, runs[index])}</th>'
        bodies.append(f'<tbody><tr class="run">{name}</tr>{"".join(map(_row, rows))}</tbody>')
    return _scroll(f'<table class="{what}"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>')


def _named(index: int, run: RunData) -> str:
    return f'<span class="named" data-swatch="{index}" title="{escape(run.name)}">{escape(run.name)}</span>'


def _row(row: Row, style: str = "") -> str:
    return f'<tr><th scope="row">{escape(row[0].text)}</th>{"".join(_cell(cell, style) for cell in row[1:])}</tr>'


def _cell(cell: Cell, style: str) -> str:
    if cell.share is not None:
        return f'<td class="bar" style="--share:{cell.share:.3f}">{escape(cell.text)}</td>'
    classes = " ".join(name for name in (style, "best" if cell.best else "") if name)
    return f'<td class="{classes}">{escape(cell.text)}</td>' if classes else f"<td>{escape(cell.text)}</td>"


def _scroll(content: str) -> str:
    """A table too wide for the window moves within its card, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{content}</div>'


def _remarks(runs: Sequence[RunData]) -> str:
    items = [f"<li><b>{escape(run.name)}</b> {escape(note)}</li>" for run in runs for note in notes(run)]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _legend(runs: Sequence[RunData]) -> str:
    kinds = dict.fromkeys(phase.kind or "unknown" for run in runs if run.changes for phase in run.phases)
    return _legend_of(list(kinds), "phases", ' id="phaselegend"') if kinds else ""


def _legend_of(kinds: Sequence[str], name: str = "forms", mark: str = "") -> str:
    items = "".join(f'<span><i class="{kind}"></i>{escape(kind)}</span>' for kind in kinds)
    return f'<div class="legend"{mark}><span class="muted">{name}</span>{items}</div>\n'


def _rank_hint(runs: Sequence[RunData]) -> str:
    if any(run.ranks for run in runs):
        return ""
    return (
        '<p class="muted">For a heat map, layer by time, train with <code>--drt_log_rank_steps 100 '
        "--drt_log_rank_per_layer true</code>.</p>"
    )


def _footer() -> str:
    return (
        "<p>Seconds are those of update steps and switches, without evaluation and saving, unless a note says "
        "otherwise; between the rows of the log that tell the time they are interpolated. A point of step k stands at "
        "the end of the first k updates. FLOPs and parameters relative to dense are averages of the whole plan, for "
        "the target layers. Effective rank: the exponential of the entropy of the normalised singular values.</p>"
    )
