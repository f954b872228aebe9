"""DRIFT's ranks: a curve from the first rank to the last, cut into a few levels (Sun et al. 2025, arXiv 2502.03822).

The original computes a rank in every epoch. Here a change of rank is a change of form of all layers, so that the curve
is met by levels at equal distances: at any time the level that is nearest to it, which is half a level off at most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_drt.schedule.boundary import number_text
from hf_drt.schedule.form_text import form_text

STEEPNESS, MIDPOINT = 10.0, 50.0
MOST_LEVELS = 32


@dataclass(frozen=True)
class Curve:
    """How far the rank has gone at a share t of the way in time, before it is stretched (:func:`gone`).

    Attributes:
        share: Gives it for ``(t, k, m)``: t in [0, 1], the steepness k, and the midpoint m in (0, 1).
        options: Of 'steepness' and 'midpoint' those that it reads.
    """

    share: Callable[[float, float, float], float]
    options: tuple[str, ...] = ()


CURVES: dict[str, Curve] = {
    "linear": Curve(lambda t, k, m: t),
    "cosine": Curve(lambda t, k, m: (1 - math.cos(math.pi * t)) / 2),
    # 1 / (1 + exp(-k (t - m))), by a function that never overflows
    "sigmoid": Curve(lambda t, k, m: (1 + math.tanh(k * (t - m) / 2)) / 2, ("steepness", "midpoint")),
    "exponential": Curve(lambda t, k, m: -math.expm1(-k * t), ("steepness",)),
    "logarithmic": Curve(lambda t, k, m: 1 - 1 / (1 + math.log2(1 + k * t)), ("steepness",)),
}
"""DRIFT's: of a run of T epochs ``r = r_max - (r_max - r_min) share(i / T)`` in epoch i, the steepness k being that
per epoch times T. Its logarithm, of base 2, counts epochs: k = T there."""


def gone(shape: str, t: float, steepness: float, midpoint: float) -> float:
    """Share of the way from the first rank to the last at a share t of the time, from 0 at t = 0 to 1 at t = 1.

    DRIFT's sigmoid, exponential and logarithmic curves do not end at the last rank, nor does the sigmoid begin at the
    first: the curve f is stretched to ``(f(t) - f(0)) / (f(1) - f(0))``.

    Args:
        shape: One of :data:`CURVES`.
        t: In [0, 1].
        steepness: k, of the whole way.
        midpoint: m, in (0, 1).
    """
    begin, now, end = (CURVES[shape].share(at, steepness, midpoint) for at in (0.0, t, 1.0))
    return (now - begin) / (end - begin)


def drift(first: float, last: float, shape: str, steepness: float, midpoint: float, until: float, levels: int) -> str:
    """The text of a schedule of adapters in ``levels`` ranks from ``first`` to ``last``, full rank for a share of 1.

    Level j of n, counted from 0, has the rank ``first + (last - first) j / (n - 1)``, and begins where the curve is
    half a level before it: at ``gone = (j - 1/2) / (n - 1)``. Of levels that begin at the same time the last one stays.

    Args:
        first, last: Shares of min(out, in), in (0, 1].
        until: When the curve is at ``last``, in % of the run.
        midpoint: In % of ``until``.
    """
    starts = {0.0: first}
    for level in range(1, levels):
        t = _when(shape, (level - 0.5) / (levels - 1), steepness, midpoint / 100)
        rank = last if level == levels - 1 else first + (last - first) * level / (levels - 1)
        starts[round(until * t, 4)] = round(rank, 6)
    return " ".join(f"{_form(rank)}@{number_text(start)}{'%' if start else ''}" for start, rank in starts.items())


def _form(share: float) -> str:
    return "dense" if share == 1 else form_text("adapter", share)


def _when(shape: str, share: float, steepness: float, midpoint: float) -> float:
    """The time at which :func:`gone` is ``share``: it rises, and 60 halvings find it to float's last bits."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gone(shape, middle, steepness, midpoint) < share else (low, middle)
    return high
