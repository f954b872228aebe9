"""The learning rate of every update step, before the run."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Curve = Callable[[], list[float] | None]


def simulated_curve(make: Callable[[torch.optim.Optimizer], Any], lr: float, max_steps: int) -> Curve:
    """LR curve of the scheduler that ``make`` builds, by stepping it over an optimizer without a model.

    The curve is None where the scheduler follows the loss, and so cannot be known beforehand.
    """

    def curve() -> list[float] | None:
        optimizer = _dummy([lr])
        return _stepped(make(optimizer), optimizer, max_steps)

    return curve


def existing_curve(scheduler: Any, max_steps: int) -> Curve:
    """LR curve of a scheduler that exists already: a copy of it is stepped, over an optimizer without a model.

    None where it follows the loss, or cannot be copied.
    """

    def curve() -> list[float] | None:
        real = getattr(scheduler, "optimizer", None)
        if real is None:
            return None
        optimizer = _dummy([float(group["lr"]) for group in real.param_groups])
        for group, other in zip(optimizer.param_groups, real.param_groups, strict=True):
            group |= {key: other[key] for key in ("initial_lr",) if key in other}
        inner = getattr(real, "optimizer", real)
        try:
            return _stepped(copy.deepcopy(scheduler, {id(real): optimizer, id(inner): optimizer}), optimizer, max_steps)
        except (TypeError, AttributeError, RuntimeError):
            return None

    return curve


def _dummy(rates: list[float]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates], lr=rates[0])


def _stepped(scheduler: Any, optimizer: torch.optim.Optimizer, max_steps: int) -> list[float] | None:
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        return None
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copied scheduler counts the steps of the real optimizer
        for _ in range(max_steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return rates
