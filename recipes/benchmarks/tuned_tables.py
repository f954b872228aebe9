"""Tables of a task whose methods are tuned: what each ends with in how many seconds, and what its rates gave."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from methods import Missing, record_of, seconds_of, settings_of, trial_loss
from store import Store, task_file
from tables import chosen, deviation, metric
from tuning import pairs_of, trial_name


@dataclass(frozen=True)
class Row:
    """A method's runs, means over the seeds.

    Attributes:
        label: Of the method.
        losses: Of the evaluation at the end, by seed.
        seconds: CPU seconds of the update steps: their number times what the pilot has measured; None without a pilot.
        measured: CPU seconds of the update steps and switches, as the runs have measured them.
        steps: Update steps.
        rates: Of the matrices and of the others.
        others: Further metrics, each by seed: ``accuracy``, and what the task's probe gives.
    """

    label: str
    losses: list[float]
    seconds: float | None
    measured: float
    steps: float
    rates: tuple[float | None, float]
    others: dict[str, list[float]]

    def metric(self, name: str) -> list[float]:
        """``loss``, or a further metric, by seed."""
        return self.losses if name == "loss" else self.others[name]


def rows_of(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> dict[str, Row]:
    """One row per method that has records; of all methods but trials if they are left out."""
    found = {}
    for method in methods or chosen(name):
        change = task_file(name)["methods"][method]
        records = [r for seed in seeds if (r := record_of(name, method, seed, store))]
        if records:
            found[method] = _row(name, method, change.get("label", method), records, store)
    return found


def _row(name: str, method: str, label: str, records: list[dict[str, Any]], store: Store) -> Row:
    steps = statistics.fmean(r["steps"] for r in records)
    training = records[0]["settings"]["training"]
    others = [{"accuracy": _accuracy(name, r)} | r.get("probe", {}) for r in records]
    return Row(
        label=label,
        losses=[r["curve"][-1]["loss"] for r in records],
        seconds=_known(lambda: seconds_of(name, method, round(steps), store)),
        measured=statistics.fmean(r["cpu_seconds"] for r in records),
        steps=steps,
        rates=(training.get("drt_matrix_lr", training.get("matrix_rate")), training["learning_rate"]),
        others={key: [o[key] for o in others] for key in others[0] if all(o.get(key) is not None for o in others)},
    )


def _accuracy(name: str, record: dict[str, Any]) -> float | None:
    """At the end of a run; a classifier's is the value that it is judged by."""
    return record["value"] if metric(name) == "accuracy" else record["curve"][-1].get("accuracy")


def _known(value: Callable[[], float]) -> float | None:
    """What a function of the records gives; None while a record is missing."""
    try:
        return value()
    except Missing:
        return None


def print_tuned(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> None:
    """The table, in Markdown, the longest runs first: loss, further metrics, seconds relative to those of dense AdamW,
    rates."""
    rows = rows_of(name, store, seeds, methods)
    names = list(dict.fromkeys(key for row in rows.values() for key in row.others))
    dense = _known(lambda: _dense_seconds(name, store, seeds[0]))
    metrics = (key.replace("_", " ") for key in names)
    _print_header(name, "loss", *metrics, "seconds", "of dense AdamW's", "steps", "rates", "seeds")
    for row in sorted(rows.values(), key=_longest_first):
        cells = [mean_text(row.losses), *(mean_text(row.others.get(key, [])) for key in names)]
        known = row.seconds is not None
        cells += [f"{row.seconds:.0f}" if known else f"({row.measured:.0f})"]
        cells += [f"{row.seconds / dense:.2f}" if known and dense else "–", f"{row.steps:.0f}"]
        matrices, others = row.rates
        cells += [f"{others:g}" if matrices is None else f"{matrices:g}, {others:g}", str(len(row.losses))]
        print(f"| {row.label} | {' | '.join(cells)} |")
    hours = sum(record["cpu_seconds"] for record in store.records) / 3600
    print(f"\n{hours:.2f} hours of computing for all runs of the task, trials among them.")


def _dense_seconds(name: str, store: Store, seed: int) -> float:
    """CPU seconds of dense AdamW's run, whether it is shown or not.

    Raises:
        Missing: There was no pilot of it, its rates have not been tried, or the task does not have it.
    """
    if "dense" not in task_file(name)["methods"]:
        raise Missing("dense")
    return seconds_of(name, "dense", settings_of(name, "dense", seed, store)["training"]["max_steps"], store)


def _longest_first(row: Row) -> tuple[float, float]:
    """And of runs of equal seconds, to ten, the best."""
    return -round(row.seconds or row.measured, -1), statistics.fmean(row.losses)


SUMMARY = {  # method: heading
    "dense": "dense, AdamW",
    "default": "default, 0.40 of those seconds",
    "dense_in_default": "AdamW in the default's seconds",
    "muon_in_default": "Muon in the default's seconds",
    "muon": "dense, Muon",
    "default_in_muon": "default, 0.70 of those seconds",
}


def summary_rows(names: dict[str, tuple[str, str]], folder: Path, seeds: list[int]) -> Iterator[tuple[str, ...]]:
    """The default beside dense AdamW and dense Muon, at their full lengths and in its own seconds: a row per task.

    Args:
        names: Of the tasks; each with its title, and the metric that is shown: ``loss``, or a further one.
        folder: Of the records.
        seeds: Of the runs.
    """
    for name, (title, shown) in names.items():
        rows = rows_of(name, Store(folder, name), seeds)
        yield title, *(mean_text(rows[method].metric(shown) if method in rows else []) for method in SUMMARY)


def mean_text(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = deviation(values)
    return "–" if not values else f"{statistics.fmean(values):.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def print_rates(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> None:
    """Of every tuned method the losses of its trials, which all have one seed: a line per rate of the matrices, a
    column per rate of the others. The lowest is in bold."""
    for method, entry in task_file(name).get("tuned", {}).get("methods", {}).items():
        if methods and method not in methods:
            continue
        losses = {pair: _known(partial(trial_loss, name, store, trial_name(method, pair))) for pair in pairs_of(entry)}
        known = [loss for loss in losses.values() if loss is not None]
        if not known:
            continue
        others = sorted(entry["others"])
        _print_header(entry.get("label", method), *(f"{o:g}" for o in others))
        for m in sorted(entry["matrices"]):
            print(f"| {m:g} | {' | '.join(_loss(losses.get((m, o)), min(known)) for o in others)} |")
        print()


def _print_header(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")


def _loss(loss: float | None, best: float) -> str:
    text = "–" if loss is None else f"{loss:.3f}"
    return f"**{text}**" if loss == best else text
