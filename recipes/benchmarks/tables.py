"""Tables of a task from its records: mean and spread over the seeds, ratios to dense of the same seed, memory."""

import statistics
from fnmatch import fnmatchcase
from typing import Any

from methods import record_of
from store import Store, task_file

MIB = 2**20
BYTES = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")


def pairs(name: str, method: str, store: Store, seeds: list[int]) -> list[tuple[dict, dict]]:
    """The records of a method and of dense, for the seeds that have both."""
    found = ((record_of(name, method, seed, store), record_of(name, "dense", seed, store)) for seed in seeds)
    return [(record, dense) for record, dense in found if record and dense]


def rows(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> list[dict[str, Any]]:
    """One row per method that has records: value, deviation, and means of ratios to dense of the same seed."""
    found = []
    for method in methods or chosen(name):
        change = task_file(name)["methods"][method]
        if both := pairs(name, method, store, seeds):
            row = _row(both, +1 if metric(name) == "accuracy" else -1)
            found.append({"method": method, "label": change.get("label", method), **row})
    return found


def whole_methods(task: str) -> dict[str, Any]:
    """A task's methods without the trials of learning rates, which are shorter."""
    return {method: change for method, change in task_file(task)["methods"].items() if "trial" not in change}


def chosen(task: str, wanted: list[str] | None = None, but: list[str] | None = None) -> list[str]:
    """The methods of a task that are shown: those that ``wanted`` names, all if it is left out, without those that
    ``but`` names; both by name or pattern (``*turns*``), in the task's order. Trials are shown by name alone.

    Raises:
        ValueError: A name or pattern is of no method, or none is left.
    """
    known, wanted, but = task_file(task)["methods"], wanted or ["*"], but or []
    for pattern in (*wanted, *but):
        if not any(fnmatchcase(method, pattern) for method in known):
            raise ValueError(f"task {task} has no method {pattern!r}; it has {', '.join(known)}.")
    found = known.keys() & wanted | {m for m in whole_methods(task) if _named(m, wanted)}
    left = [method for method in known if method in found and not _named(method, but)]
    if not left:
        raise ValueError(f"no method of {task} is left of {', '.join(wanted)} without {', '.join(but)}.")
    return left


def _named(method: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(method, pattern) for pattern in patterns)


def metric(task: str) -> str:
    """What ``value`` is in a task's records: ``accuracy``, or ``eval loss``."""
    return "accuracy" if task_file(task)["kind"].endswith("classifier") else "eval loss"


def _row(both: list[tuple[dict, dict]], sign: int) -> dict[str, Any]:
    values, dense = [r["value"] for r, _ in both], [d["value"] for _, d in both]
    spread = deviation(dense)
    ranks = [r["curve"][-1]["effective_rank"] for r, _ in both]
    return {
        "seeds": len(both),
        "value": statistics.fmean(values),
        "deviation": deviation(values),
        "distance": sign * (statistics.fmean(values) - statistics.fmean(dense)) / spread if spread else None,
        "seconds": statistics.fmean(r["cpu_seconds"] for r, _ in both),
        "time": statistics.fmean(r["cpu_seconds"] / d["cpu_seconds"] for r, d in both),
        "flops": statistics.fmean(r["flops"] / d["flops"] for r, d in both),
        "peak": statistics.fmean(max(p["peak_mib"] for p in r["phases"]) for r, _ in both),
        "trainable": statistics.fmean(_average_trainable(r) / _average_trainable(d) for r, d in both),
        "rank": None if None in ranks else statistics.fmean(ranks),
        "hours": sum(r["seconds"] for r, _ in both) / 3600,
    }


def deviation(values: list[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _average_trainable(record: dict[str, Any]) -> float:
    return sum(p["trainable"] * p["steps"] for p in record["phases"]) / record["steps"]


def print_table(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> None:
    """The table, in Markdown. ``to dense``: by how many standard deviations of dense's
    seeds the mean is better (positive) or worse than dense's."""
    print(f"| {name} | value | to dense | seeds | time | FLOPs | trainable | peak MiB | effective rank | hours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    table = rows(name, store, seeds, methods)
    for row in table:
        spread = f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
        distance = f"{row['distance']:+.1f} σ" if row["distance"] is not None else "–"
        rank = f"{row['rank']:.1f}" if row["rank"] is not None else "–"
        print(
            f"| {row['label']} | {row['value']:.4f}{spread} | {distance} | {row['seeds']} | {row['time']:.2f} "
            f"| {row['flops']:.2f} | {row['trainable']:.2f} | {row['peak']:,.0f} | {rank} | {row['hours']:.2f} |"
        )
    print(f"\n{sum(row['hours'] for row in table):.2f} hours of training in all.")


# ---- memory


def memory_rows(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> list[dict[str, Any]]:
    """One row per method and phase: MiB of its tensors (None in records that lack them) and peak of the process.

    A phase's numbers are means over the seeds that have such a phase; ``adaptive`` has different ones.
    """
    found = []
    for method in methods or chosen(name):
        change = task_file(name)["methods"][method]
        records = [r for seed in seeds if (r := record_of(name, method, seed, store))]
        for index in range(max((len(r["phases"]) for r in records), default=0)):
            phases = [r["phases"][index] for r in records if index < len(r["phases"])]
            found.append({"method": method, "label": change.get("label", method), "phase": index, **_memory(phases)})
    return found


def _memory(phases: list[dict[str, Any]]) -> dict[str, Any]:
    known = [p for p in phases if all(key in p for key in BYTES)]
    sizes = {key: statistics.fmean(p[key] for p in known) / MIB if known else None for key in BYTES}
    return {
        "kind": phases[0]["kind"],
        "steps": statistics.fmean(p["steps"] for p in phases),
        **sizes,
        "tensors": sum(sizes.values()) if known else None,
        "peak": statistics.fmean(p["peak_mib"] for p in phases),
    }


def print_memory(name: str, store: Store, seeds: list[int], methods: list[str] | None = None) -> None:
    """The table of memory, in Markdown, in MiB. The peak holds activations and what the allocator keeps, too."""
    print(f"| {name} | phase | steps | parameters | gradients | optimizer | together | peak of the process |")
    print("|---|---|---|---|---|---|---|---|")
    for row in memory_rows(name, store, seeds, methods):
        cells = (f"{row[key]:,.1f}" if row[key] is not None else "–" for key in (*BYTES, "tensors"))
        print(
            f"| {row['label']} | {row['phase']} {row['kind']} | {row['steps']:.0f} | {' | '.join(cells)} "
            f"| {row['peak']:,.0f} |"
        )
