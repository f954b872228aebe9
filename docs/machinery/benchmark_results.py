"""The README's table of results, from the records of the benchmarks."""

import sys
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
sys.path.append(str(BENCHMARKS))

from tuned_tables import SUMMARY, summary_rows  # noqa: E402

TASKS = {
    "brown_lm_wide": ("Llama on Brown and GCIDE, loss ↓", "loss"),
    "fashion_vit_wide": ("vision transformer on Fashion-MNIST, accuracy ↑", "accuracy"),
    "brown_tagger_wide": ("ModernBERT that tags Brown, accuracy ↑", "accuracy"),
}
SEEDS = [1, 2, 3]
HEAD = ("", *SUMMARY.values())


def result_rows() -> Iterator[tuple[str, ...]]:
    """One row per task: the default beside dense AdamW and dense Muon."""
    for cells in summary_rows(TASKS, BENCHMARKS / "results", SEEDS):
        yield tuple(cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") for cell in cells)
