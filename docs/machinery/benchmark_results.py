"""The README's table of results, from the records of the benchmarks."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
sys.path.append(str(BENCHMARKS))

from store import Store  # noqa: E402
from tables import rows  # noqa: E402

TASKS = {
    "fashion_vit": ("vision transformer on Fashion-MNIST, accuracy ↑", 3),
    "brown_lm": ("Llama on Brown and GCIDE, loss ↓", 3),
    "brown_bert": ("BERT on Brown, loss ↓", 3),
}
SEEDS = [1, 2, 3]
HEAD = ("", "dense", "dense, equal seconds", "`auto`", "its time, dense = 1", "its FLOPs, dense = 1")


def result_rows() -> Iterator[tuple[str, ...]]:
    """One row per task: value of each method; time and FLOPs of the default relative to dense training."""
    for task, (title, digits) in TASKS.items():
        found = {row["method"]: row for row in rows(task, Store(BENCHMARKS / "results", task), SEEDS)}
        values = (_value(found[method], digits) for method in ("dense", "dense_equal_seconds", "default"))
        yield title, *values, f"{found['default']['time']:.2f}", f"{found['default']['flops']:.2f}"


def _value(row: dict[str, Any], digits: int) -> str:
    if row["deviation"] is None:
        return f"{row['value']:.{digits}f} (one seed)"
    fewer = "" if row["seeds"] == len(SEEDS) else f" ({row['seeds']} seeds)"
    return f"{row['value']:.{digits}f} ± {row['deviation']:.{digits}f}{fewer}".replace(" ", "\N{NO-BREAK SPACE}")
