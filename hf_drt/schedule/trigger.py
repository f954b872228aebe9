"""Trigger: full-rank windows whose time is not known before the run."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hf_drt.schedule.boundary import number_text


@dataclass(frozen=True)
class Check:
    """What was seen at one check of a low-rank phase.

    Attributes:
        step: Update steps made so far.
        effective_rank: Mean over the target layers.
        loss: Mean training loss of the low-rank steps since the check before; None where it is not told.
    """

    step: int
    effective_rank: float
    loss: float | None = None


@dataclass(frozen=True)
class Trigger:
    """When a full-rank window begins, and how long it lasts.

    Attributes:
        signal: 'rank': the effective rank has fallen by ``drop`` % from the highest of this low-rank phase; 'loss': the
            mean loss since the last check is less than ``plateau`` % below that of the check before; 'either'.
        drop: In %, in (0, 100).
        plateau: In %, in (0, 100).
        window: Length of a window, in % of the run, in (0, 100).
        every: Distance of two checks, in % of the run, in (0, 100).

    Raises:
        ValueError: A value is outside its interval.
    """

    signal: str = "either"
    drop: float = 3.0
    plateau: float = 1.0
    window: float = 10.0
    every: float = 5.0

    def __post_init__(self) -> None:
        if self.signal not in ("rank", "loss", "either"):
            raise ValueError(f"preset option signal must be rank, loss or either, got {self.signal}.")
        for name in ("drop", "plateau", "window", "every"):
            if not 0 < getattr(self, name) < 100:
                raise ValueError(f"preset option {name} must be in (0, 100), in %, got {getattr(self, name):g}.")

    def reason(self, checks: Sequence[Check]) -> str | None:
        """Why a window is due after the checks of one low-rank phase, or None."""
        now = checks[-1]
        highest = max(check.effective_rank for check in checks)
        if self.signal != "loss" and now.effective_rank < (1 - self.drop / 100) * highest:
            return "rank"
        losses = [check.loss for check in checks[-2:] if check.loss is not None]
        if self.signal != "rank" and len(losses) == 2 and losses[1] > (1 - self.plateau / 100) * losses[0]:
            return "loss"
        return None

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        options = (f"{name}={value if isinstance(value, str) else number_text(value)}" for name, value in values)
        return f"adaptive({','.join(options)})"
