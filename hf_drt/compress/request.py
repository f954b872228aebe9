"""What is asked of a compression, checked before the model is looked at."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_drt.compress.criteria import ALLOCATIONS
from hf_drt.compress.objective import Loss
from hf_drt.config import DRTConfig


@dataclass(frozen=True)
class Request:
    """What is asked for, checked.

    Attributes:
        criterion: Name and value.
        allocation: As asked for; None for what suits the calibration.
        loss: The function, None for the model's own.
        patterns: Which layers.
    """

    criterion: tuple[str, float]
    rank_multiple: int
    calibration: Iterable[Any] | None
    allocation: str | None
    sequential: bool
    loss: Loss | None
    patterns: dict[str, Any]

    def __post_init__(self) -> None:
        name, value = self.criterion
        ranks: dict[str, Any] = {name: value} if name in ("rank", "rank_ratio") else {}
        DRTConfig(rank_multiple=self.rank_multiple, **self.patterns, **ranks)  # checks them
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}.")
        if self.allocation is not None and name != "parameters":
            raise ValueError(
                f"allocation={self.allocation!r} has no effect with {name}: it shares out a budget. Set parameters."
            )
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"loss must be a function of the model and a batch, got {self.loss!r}.")
        if self.loss is not None and (name != "parameters" or self.allocation in ("error", "uniform")):
            raise ValueError("loss has no effect but with parameters and allocation='harm'. Leave it out.")
        if self.calibration is None:
            self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Without calibration."""
        idle = {"allocation='harm'": self.allocation == "harm", "sequential=True": self.sequential, "loss": self.loss}
        if given := [setting for setting, is_set in idle.items() if is_set]:
            raise ValueError(f"{given[0]} needs calibration batches. Give calibration=batches, or leave it out.")

    @property
    def may_harm(self) -> bool:
        """Whether a budget is shared out by harm, if there is a loss to measure it by."""
        shares = self.criterion[0] == "parameters" and self.allocation in (None, "harm")
        return shares and self.calibration is not None
