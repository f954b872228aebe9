"""How far a switch moves what the model computes: max |difference| of a probe's output, before to after."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
Probe = Callable[[], Tensor | None]


class FunctionError:
    """The output of a ``probe`` before a switch, and its largest difference from the one after it.

    A measurement, of which no failure stops a run: whatever the probe raises, and outputs that cannot be compared, are
    logged with their cause, and there is no number.

    Of an optimizer that evaluates at averages, layers that change are at their averages both times, and all others at
    the weights in training: what is compared is the change of form alone.
    """

    def __init__(self, probe: Probe | None):
        self._probe = probe
        self._before: Tensor | None = None

    def look(self) -> None:
        """Keep the output of now."""
        self._before = None if self._probe is None else _guarded(self._probe)

    def measure(self) -> float | None:
        """max |difference|, or None."""
        probe, before = self._probe, self._before
        return None if probe is None or before is None else _guarded(lambda: _compared(before, probe()))


def _compared(before: Tensor, after: Tensor | None) -> float | None:
    return None if after is None else largest_difference(before, after)


def largest_difference(before: Tensor, after: Tensor) -> float:
    """max |after - before|, in float32 at least, over the entries that are finite; the others must be the same in both.

    Raises:
        ValueError: Shapes differ, there is no finite entry, or others are not finite after than before.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"the output has shape {tuple(after.shape)} after the switch, and {tuple(before.shape)} before"
        )
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    before, after = before.to(dtype), after.to(before.device, dtype)
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(after)):
        raise ValueError("inf or nan stands at other places of the output after the switch than before")
    if not finite.any():
        raise ValueError("the output has no finite number")
    return (after[finite] - before[finite]).abs().max().item()


def _guarded(measure: Callable[[], T | None]) -> T | None:
    try:
        return measure()
    except Exception as error:  # whatever a model raises, the switch goes on
        logger.warning("no function-preservation error: %s: %s", type(error).__name__, error)
        return None
