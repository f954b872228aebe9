"""Tables of a task from its records: mean and spread over the seeds, ratios to dense of the same seed."""

import statistics
from typing import Any

from benchmark import Missing, settings_of
from store import Store, task_file


def rows(name: str, store: Store, seeds: list[int]) -> list[dict[str, Any]]:
    """One row per method that has records: value, deviation, and means of ratios to dense of the same seed."""
    task = task_file(name)
    found = []
    for method, change in task["methods"].items():
        pairs = []
        for seed in seeds:
            try:
                dense = store.find("dense", settings_of(name, "dense", seed, store))
                record = store.find(method, settings_of(name, method, seed, store))
            except Missing:
                continue
            if dense and record:
                pairs.append((record, dense))
        if pairs:
            found.append({"method": method, "label": change.get("label", method), **_row(pairs)})
    return found


def _row(pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    values = [record["value"] for record, _ in pairs]
    return {
        "seeds": len(pairs),
        "value": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "seconds": statistics.fmean(r["cpu_seconds"] for r, _ in pairs),
        "time": statistics.fmean(r["cpu_seconds"] / d["cpu_seconds"] for r, d in pairs),
        "flops": statistics.fmean(r["flops"] / d["flops"] for r, d in pairs),
        "peak": statistics.fmean(max(p["peak_mib"] for p in r["phases"]) for r, _ in pairs),
        "trainable": statistics.fmean(_average_trainable(r) / _average_trainable(d) for r, d in pairs),
        "rank": statistics.fmean(r["curve"][-1]["effective_rank"] for r, _ in pairs),
    }


def _average_trainable(record: dict[str, Any]) -> float:
    return sum(p["trainable"] * p["steps"] for p in record["phases"]) / record["steps"]


def print_table(name: str, store: Store, seeds: list[int]) -> None:
    """The table, in Markdown."""
    print(f"| {name} | value | seeds | time | FLOPs | trainable | peak MiB | effective rank |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(name, store, seeds):
        spread = f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
        print(
            f"| {row['label']} | {row['value']:.4f}{spread} | {row['seeds']} | {row['time']:.2f} | {row['flops']:.2f} "
            f"| {row['trainable']:.2f} | {row['peak']:,.0f} | {row['rank']:.1f} |"
        )
