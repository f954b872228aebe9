"""What a report says in words and numbers: runs side by side, phases, switches, and where its seconds come from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_drt.report.run_data import PhaseData, RunData, Series, SwitchData

_LOWER_IS_BETTER = ("loss", "perplexity", "error", "wer", "cer", "mse", "mae", "rmse")


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell; ``share`` of the column's largest number, for a bar behind it; ``best`` of its row."""

    text: str
    share: float | None = None
    best: bool = False


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header, the first column names the row; groups of them by the index of their run."""

    header: tuple[str, ...]
    groups: dict[int, tuple[Row, ...]]


@dataclass(frozen=True)
class _Column:
    name: str
    pattern: str
    read: Callable[[RunData, PhaseData], float | None]
    bar: bool = True


_PHASE_COLUMNS = (
    _Column("steps", ",d", lambda run, phase: phase.steps, bar=False),
    _Column("seconds", ",.1f", lambda run, phase: phase.seconds),
    _Column("tokens/s", ",.0f", lambda run, phase: phase.tokens_per_second),
    _Column("samples/s", ",.1f", lambda run, phase: phase.samples_per_second),
    _Column("peak MiB", ",.0f", lambda run, phase: phase.peak_memory),
    _Column("trainable parameters", ",d", lambda run, phase: phase.trainable),
    _Column("effective rank", ".1f", lambda run, phase: phase.effective_rank),
)


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error rather than a score, by its name."""
    return any(word in metric.lower().split("_") for word in _LOWER_IS_BETTER)


def main_metrics(runs: Sequence[RunData]) -> list[str]:
    """The metrics to judge the runs by: those of the evaluations, else the loss."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    evaluated = sorted((name for name in names if name.startswith("eval_")), key=lambda name: name != "eval_loss")
    return evaluated or [name for name in names if name == "loss"]


def best_point(series: Series, metric: str) -> tuple[int, float] | None:
    """Step and value of the best point; None if no value is a number."""
    finite = [(point.step, point.value) for point in series if math.isfinite(point.value)]
    pick = min if lower_is_better(metric) else max
    return pick(finite, key=lambda found: found[1], default=None)


def overview(runs: Sequence[RunData]) -> list[Row]:
    """All runs side by side: rows of a name, and one cell per run."""
    rows = [_row("schedule", runs, _schedule), _row("update steps", runs, _steps)]
    for metric in main_metrics(runs):
        rows += _metric_rows(metric, runs)
    rows += [
        _row("training seconds", runs, _training_seconds),
        _row("of that in switches", runs, _switch_share),
        _row("train_runtime, all included", runs, lambda run: number(run.totals.get("train_runtime"), ",.1f", " s")),
        _row("FLOPs of the target layers / dense", runs, lambda run: _share_of_dense(run, "drt_plan_flops")),
        _row("trainable parameters of them / dense", runs, lambda run: _share_of_dense(run, "drt_plan_parameters")),
        _row("trainable parameters, average", runs, lambda run: number(average(run, "trainable"), ",.0f")),
        _row("tokens per second, average", runs, lambda run: _rate(run, "tokens_per_second", ",.0f")),
        _row("samples per second, average", runs, lambda run: _rate(run, "samples_per_second", ",.1f")),
        _row("peak memory, MiB", runs, lambda run: number(_peak(run), ",.0f")),
        _row("effective rank at the end, mean", runs, _last_rank),
    ]
    return [row for row in rows if any(cell.text != "–" for cell in row[1:])]


def _phase_columns(runs: Sequence[RunData]) -> list[_Column]:
    metrics = main_metrics([run for run in runs if run.changes])
    if not metrics:
        return [*_PHASE_COLUMNS]

    def at_the_end(run: RunData, phase: PhaseData) -> float | None:
        return value_in(run.series.get(metrics[0], ()), phase)

    return [*_PHASE_COLUMNS, _Column(f"{title(metrics[0])} at the end", "#.4g", at_the_end, bar=False)]


def phase_table(runs: Sequence[RunData]) -> Table:
    """One row per phase: what it cost and where it led. A bar is a share of the largest number of all runs."""
    phases = [(run, phase) for run in runs if run.changes for phase in run.phases]
    ranked = any(phase.ranks for _, phase in phases)
    columns = [column for column in _phase_columns(runs) if any(column.read(*each) is not None for each in phases)]
    largest = {c.name: max(value for each in phases if (value := c.read(*each)) is not None) for c in columns}

    def row(run: RunData, phase: PhaseData) -> Row:
        values = [(column, column.read(run, phase)) for column in columns]
        cells = (Cell(number(v, c.pattern), share(v, largest[c.name]) if c.bar else None) for c, v in values)
        rank = (Cell(_ranks(phase)),) if ranked else ()
        return (Cell(phase.numbered), *rank, *cells)

    groups = {index: tuple(row(run, phase) for phase in run.phases) for index, run in enumerate(runs) if run.changes}
    names = ("phase", *(("rank",) if ranked else ()), *(column.name for column in columns))
    return Table(names, groups)


def switch_table(runs: Sequence[RunData]) -> Table:
    """One row per change of form: what it took, and what it cost."""
    header = ("switch", "into phase", "seconds", "truncation error", "merge error", "function error")
    longest = max((switch.seconds or 0.0 for run in runs for switch in run.switches), default=0.0)

    def row(run: RunData, switch: SwitchData) -> Row:
        labels = {phase.index: phase.numbered for phase in run.phases}
        errors = (switch.truncation_error, switch.merge_error, switch.function_error)
        return (
            Cell(f"step {switch.step:,}"),
            Cell(labels.get(switch.phase, str(switch.phase))),
            Cell(number(switch.seconds, ".3f"), share(switch.seconds, longest)),
            *(Cell(number(error, ".2g")) for error in errors),
        )

    changing = [(index, run) for index, run in enumerate(runs) if run.changes and run.switches]
    return Table(header, {index: tuple(row(run, switch) for switch in run.switches) for index, run in changing})


def notes(run: RunData) -> list[str]:
    """What a reader has to know of a run before comparing it with others."""
    found = []
    if run.step < run.max_steps:
        found.append(
            f"stands at update step {run.step:,} of {run.max_steps:,}; its plan's averages are of the whole run."
        )
    if run.clock.source == "runtime":
        found.append(
            "is of a plain Trainer: its seconds are train_runtime less evaluations, spread evenly; saving and start-up "
            "are in them, and only the last session of a resumed run. Trained with drt_schedule='dense@0' it would be "
            "measured as the others are."
        )
    elif run.clock.source is None:
        found.append("has no seconds: call trainer.save_state() after trainer.train(). It is drawn over steps only.")
    if run.dynamic and run.plan is None:
        found.append("has no checkpoint with a drt_state.json, so that the forms of its phases are unknown.")
    if run.dynamic and run.ranks is None:
        found.append("has no ranks by layer; drt_log_rank_steps and drt_log_rank_per_layer give a heat map.")
    if any(not math.isfinite(point.value) for point in run.series.get("loss", ())):
        found.append("has losses that are no numbers: it has diverged.")
    return found


def _ranks(phase: PhaseData) -> str:
    """Rank of the target layers, the lowest to the highest where they differ."""
    if phase.ranks is None:
        return "full" if phase.kind in ("dense", "frozen") else "–"
    low, high = phase.ranks
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def number(value: float | None, pattern: str, unit: str = "") -> str:
    """A number as text; a dash if there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return format(int(value) if pattern.endswith("d") else value, pattern) + unit


def share(value: float | None, largest: float) -> float | None:
    """Length of a number's bar, in [0, 1]; None without one."""
    return value / largest if value is not None and largest > 0 and math.isfinite(value) else None


def title(key: str) -> str:
    """A key of the log, as a heading: ``eval_loss`` is eval loss."""
    return key.removeprefix("drt_").replace("_", " ").strip() or key


def value_in(series: Series, phase: PhaseData) -> float | None:
    """The last value that belongs to a phase: logged after one of its updates, and not later."""
    values = [point.value for point in series if phase.start < point.step <= phase.end]
    return values[-1] if values else None


def average(run: RunData, name: str) -> float | None:
    """A phase's number on average over the update steps, or over the seconds for a rate; None unless all are known."""
    weight = "seconds" if name.endswith("per_second") else "steps"
    known = [(getattr(phase, name), getattr(phase, weight)) for phase in run.phases]
    if not known or any(value is None or not share for value, share in known):
        return None
    return sum(value * share for value, share in known) / sum(share for _, share in known)


def _row(name: str, runs: Sequence[RunData], read: Callable[[RunData], str]) -> Row:
    return (Cell(name), *(Cell(read(run)) for run in runs))


def _metric_rows(metric: str, runs: Sequence[RunData]) -> list[Row]:
    """Final and best value of every run, the best run's set off."""
    lower = lower_is_better(metric)
    finals = [run.series[metric][-1].value if run.series.get(metric) else None for run in runs]
    bests = [best_point(run.series.get(metric, ()), metric) for run in runs]
    values = [None if best is None else best[1] for best in bests]
    texts = ["–" if best is None else f"{best[1]:#.4g} at step {best[0]:,}" for best in bests]
    return [
        _marked(f"{title(metric)}, final", finals, [number(value, "#.4g") for value in finals], lower),
        _marked(f"{title(metric)}, {'lowest' if lower else 'highest'}", values, texts, lower),
    ]


def _marked(name: str, values: Sequence[float | None], texts: Sequence[str], lower: bool) -> Row:
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = (min if lower else max)(known) if len(values) > 1 and known else None
    return (Cell(name), *(Cell(t, best=v is not None and v == best) for v, t in zip(values, texts, strict=True)))


def _schedule(run: RunData) -> str:
    if run.plan is not None:
        return run.plan
    return " ".join(f"{phase.label}@{phase.start}" for phase in run.phases) if run.dynamic else "none (plain Trainer)"


def _steps(run: RunData) -> str:
    return f"{run.step:,}" if run.step >= run.max_steps else f"{run.step:,} of {run.max_steps:,}"


def _training_seconds(run: RunData) -> str:
    return ("≤ " if run.clock.source == "runtime" else "") + number(run.clock.total, ",.1f", " s")


def _switch_share(run: RunData) -> str:
    seconds = [switch.seconds for switch in run.switches if switch.seconds is not None]
    if not seconds:
        return "–"
    text, total = number(sum(seconds), ",.2f", " s"), run.clock.total
    return f"{text} ({sum(seconds) / total:.1%})" if run.clock.source == "measured" and total is not None else text


def _rate(run: RunData, name: str, pattern: str) -> str:
    measured = average(run, name)
    if measured is None and f"train_{name}" in run.totals:  # the Trainer's own, over all of train_runtime
        return "≥ " + number(run.totals[f"train_{name}"], pattern)
    return number(measured, pattern)


def _share_of_dense(run: RunData, key: str) -> str:
    return number(run.totals.get(key), ".2f") if run.dynamic else "1 if dense"


def _peak(run: RunData) -> float | None:
    return max((phase.peak_memory for phase in run.phases if phase.peak_memory is not None), default=None)


def _last_rank(run: RunData) -> str:
    series = run.series.get("drt_effective_rank_mean")
    return number(series[-1].value, ".1f") if series else "–"
