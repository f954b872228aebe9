"""Records of trained policies, and their table."""

import math
import statistics
from collections.abc import Iterable

from json_lines import JsonLines, Record, digest

from hf_drt.tables import markdown_table

_Z = 1.959964  # of a normal distribution: 95 % lie within
HEAD = (
    "method", "success", "95 %", "by seed", "CPU s/update", "of dense", "wall s/update", "ms/chunk", "trained",
    "held-out loss", "training loss",
)  # fmt: skip


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927).

    ``(p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` with p the share that was seen of n.

    Raises:
        ValueError: There are no trials, or fewer than successes.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"of {trials} trials {successes} cannot have succeeded; give 0 <= successes <= trials, of 1.")
    p, z2 = successes / trials, _Z**2 / trials
    half = _Z * math.sqrt(p * (1 - p) / trials + z2 / trials / 4)
    return max(0.0, (p + z2 / 2 - half) / (1 + z2)), min(1.0, (p + z2 / 2 + half) / (1 + z2))


def share(successes: int, trials: int) -> str:
    """``0.84 (0.71 to 0.92)``."""
    low, high = wilson(successes, trials)
    return f"{successes / trials:.2f} ({low:.2f} to {high:.2f})"


class Records(JsonLines):
    """Those of trained policies, by their settings."""

    def find(self, settings: Record) -> Record | None:
        """The record of a run with these settings, or None."""
        return next((record for record in self.all if record["digest"] == digest(settings)), None)

    def add(self, settings: Record, results: Record) -> Record:
        """Append the record of a run."""
        return self.append({"digest": digest(settings), "settings": settings, **results})


# ---- the table


def table(records: Iterable[Record]) -> str:
    """One row per method, over its seeds; the intervals of success are of all roll-outs of all seeds together."""
    methods: dict[str, list[Record]] = {}
    for record in records:
        methods.setdefault(record["settings"]["method"], []).append(record)
    dense = methods.get("dense")
    return markdown_table(list(HEAD), [_row(name, own, dense) for name, own in methods.items()])


def _row(method: str, records: list[Record], dense: list[Record] | None) -> list[str]:
    records = sorted(records, key=lambda record: record["settings"]["seed"])
    successes, rollouts = (sum(record[key] for record in records) for key in ("successes", "rollouts"))
    low, high = wilson(successes, rollouts)
    cpu, wall, chunk = (_mean(records, key) for key in ("cpu_per_update", "wall_per_update", "chunk_ms"))
    of_dense = f"{cpu / _mean(dense, 'cpu_per_update'):.2f}" if dense else "-"
    return [
        method, f"{successes / rollouts:.2f}", f"{low:.2f} to {high:.2f}",
        " ".join(f"{record['successes'] / record['rollouts']:.2f}" for record in records),
        f"{cpu:.3f}", of_dense, f"{wall:.3f}", f"{chunk:.0f}", _trained(records[0]["trained"]),
        _spread(records, "held_out_loss"), _spread(records, "loss"),
    ]  # fmt: skip


def _mean(records: list[Record], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def _spread(records: list[Record], key: str) -> str:
    values = [record[key] for record in records]
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _trained(counts: list[int]) -> str:
    """Parameters trained in the phases of the run."""
    begin, end = counts[0], counts[-1]
    return f"{begin:,}" if begin == end else f"{begin:,} to {end:,}"
