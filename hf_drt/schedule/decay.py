"""Shapes of a decay: how a value goes from first to last, as t goes from 0 to 1."""

import math
from collections.abc import Callable


def _sigmoid(first: float, last: float, t: float) -> float:
    """Logistic curve over 10 units, stretched so that it starts at ``first`` and ends at ``last``."""

    def raw(x: float) -> float:
        return 1 / (1 + math.exp(-10 * (x - 0.5)))

    return first + (last - first) * (raw(t) - raw(0)) / (raw(1) - raw(0))


SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda first, last, t: first + (last - first) * t,
    "exponential": lambda first, last, t: first * (last / first) ** t,
    "sigmoid": _sigmoid,
}
