"""When an update step ended: seconds of training, from the few rows of a log that tell the time."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal

Rows = list[dict[str, Any]]
Anchors = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Clock:
    """Seconds of training after an update step, linear between anchors.

    Attributes:
        anchors: ``(step, seconds)``, both rising; two of one step are before and after a switch. Empty if unknown.
        source: ``measured``, seconds of steps and switches without evaluation and saving; ``runtime``, the Trainer's
            train_runtime less evaluations, spread evenly over the steps: saving and start-up are in it.
    """

    anchors: Anchors = ()
    source: Literal["measured", "runtime"] | None = None

    def at(self, step: int) -> float | None:
        """Seconds when ``step`` updates were made, before a switch; None past the last anchor."""
        index = bisect_left(self.anchors, step, key=lambda anchor: anchor[0])
        if index == len(self.anchors):
            return None
        end, seconds = self.anchors[index]
        if end == step:
            return seconds
        start, earlier = self.anchors[index - 1]
        return earlier + (seconds - earlier) * (step - start) / (end - start)

    def after_switch(self, step: int) -> float | None:
        """Seconds when ``step`` updates and the switch that follows them were made."""
        known = [seconds for at, seconds in self.anchors if at == step]
        return known[-1] if known else self.at(step)

    @property
    def total(self) -> float | None:
        """Seconds up to the last anchor."""
        return self.anchors[-1][1] if self.anchors else None


def read_clock(rows: Rows) -> Clock:
    """The clock of a run, from its ``log_history``."""
    timed = [row for row in rows if "drt_switch_seconds" in row or "drt_phase_seconds" in row]
    if all("drt_seconds" in row for row in timed):
        anchors = [(row["step"], row["drt_seconds"]) for row in rows if "drt_seconds" in row]
    else:  # begun by a version that did not log them
        anchors = _summed(timed)
    if anchors and anchors[-1][0] > 0:
        return Clock(((0, 0.0), *anchors), "measured")
    return _from_runtime(rows)


def _summed(timed: Rows) -> list[tuple[int, float]]:
    """Anchors at switches and ends of phases, from what each of them took."""
    anchors, switches, phases = [], 0.0, {}
    for row in timed:
        switches += row.get("drt_switch_seconds", 0.0)
        if "drt_phase_seconds" in row:  # a phase that was resumed is logged twice, the second time in whole
            phases[row.get("drt_phase")] = row["drt_phase_seconds"]
        anchors.append((row["step"], switches + sum(phases.values())))
    return anchors


def _from_runtime(rows: Rows) -> Clock:
    end = next((index for index, row in enumerate(rows) if "train_runtime" in row), None)
    if end is None or rows[end]["step"] < 1:
        return Clock()
    evaluation = sum(value for row in rows[:end] for key, value in row.items() if _is_evaluation_time(key))
    return Clock(((0, 0.0), (rows[end]["step"], max(rows[end]["train_runtime"] - evaluation, 0.0))), "runtime")


def _is_evaluation_time(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_runtime")
