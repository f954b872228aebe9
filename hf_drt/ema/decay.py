"""EMADecay: how much of an average stays at each update. Standard library only."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

POWER, INV_GAMMA = 2 / 3, 1.0  # diffusers' defaults


@dataclass(frozen=True)
class EMADecay:
    """The decay of every update of an average, by its count n = 1, 2, ...

    The average moves at every k-th update, k = ``update_every``, by ``avg <- d avg + (1 - d) W``. With
    ``t = (n - update_after_step) / k - 1``, rounded down, which is diffusers' for k = 1:

    - ``d = 0`` for t <= 0: the average is the weights of now;
    - ``d = min(decay, (1 + t) / (10 + t))``, the warm-up that diffusers' ``EMAModel`` has by default;
    - ``d = min(decay, 1 - (1 + t / inv_gamma) ** -power)`` where one of the two is given, its ``use_ema_warmup=True``;
    - ``d = decay`` with ``warmup=False``, as torch's ``get_ema_multi_avg_fn``.

    With warm-up, d is at least ``min_decay``.

    Attributes:
        decay: The share that stays once the warm-up is over, in (0, 1). An average over about 1 / (1 - decay) moves.
        warmup: Whether d grows from 0 on.
        inv_gamma: Moves after which the warm-up has gone some of its way; above 0. 1 if only ``power`` is given.
        power: How fast it goes on; above 0. 2/3 if only ``inv_gamma`` is given; 3/4 for runs of less than a million
            updates, 1 makes a plain mean of all weights until ``decay`` is reached (Crowson).
        min_decay: Least d after the first move, in [0, decay].
        update_after_step: Updates after which averaging begins.
        update_every: Updates between two moves.

    Raises:
        ValueError: A value is out of its interval, or would have no effect.
    """

    decay: float = 0.999
    warmup: bool = True
    inv_gamma: float | None = None
    power: float | None = None
    min_decay: float = 0.0
    update_after_step: int = 0
    update_every: int = 1

    def __post_init__(self) -> None:
        _check(_is_real(self.decay) and 0 < self.decay < 1, "decay", "lie in (0, 1), the share that stays", self.decay)
        _check(isinstance(self.warmup, bool), "warmup", "be True or False", self.warmup)
        for name in ("inv_gamma", "power"):
            value = getattr(self, name)
            _check(value is None or (_is_real(value) and 0 < value < math.inf), name, "be a number above 0", value)
        least = _is_real(self.min_decay) and 0 <= self.min_decay <= self.decay
        _check(least, "min_decay", f"lie in [0, decay = {self.decay:g}]", self.min_decay)
        for name, lowest in (("update_after_step", 0), ("update_every", 1)):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest
            _check(whole, name, f"be a whole number of update steps, {lowest} or more", value)
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        shapes = {"inv_gamma": self.inv_gamma, "power": self.power, "min_decay": self.min_decay or None}
        if not self.warmup and (idle := [f"{name}={value:g}" for name, value in shapes.items() if value is not None]):
            raise ValueError(
                f"{', '.join(idle)} would have no effect: it shapes the warm-up of the decay, which warmup=False turns "
                "off. Leave it out, or set warmup=True."
            )

    @classmethod
    def of(cls, decay: "float | EMADecay") -> "EMADecay":
        """The decay itself, or one with this number."""
        return decay if isinstance(decay, cls) else cls(decay)  # type: ignore[reportArgumentType]  # __post_init__ looks

    def at(self, update: int) -> float | None:
        """d of the n-th update, counted from 1; None where the average does not move.

        Source: diffusers, ``EMAModel.get_decay``; ``update_every`` is not from there.
        """
        if update % self.update_every:
            return None
        t = (update - self.update_after_step) // self.update_every - 1
        if t <= 0:
            return 0.0
        if not self.warmup:
            return self.decay
        return max(self.min_decay, min(self.decay, self._rising(t)))

    def _rising(self, t: int) -> float:
        if self.inv_gamma is None and self.power is None:
            return (1 + t) / (10 + t)
        gamma = INV_GAMMA if self.inv_gamma is None else self.inv_gamma
        return 1 - (1 + t / gamma) ** -(POWER if self.power is None else self.power)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must {allowed}, got {value!r}.")
