"""The learning rate of every update step, before the run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Curve = Callable[[], list[float] | None]


def simulated_curve(make: Callable[[torch.optim.Optimizer], Any], lr: float, max_steps: int) -> Curve:
    """LR curve of the scheduler that ``make`` builds, by stepping it over an optimizer without a model.

    The curve is None where the scheduler follows the loss, and so cannot be known beforehand.
    """

    def curve() -> list[float] | None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            return None
        rates = []
        for _ in range(max_steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
        return rates

    return curve


def closed_form_curve(scheduler: Any, max_steps: int) -> Curve:
    """LR curve of a scheduler that exists already, without stepping it; None if it has no closed form."""
    if not isinstance(scheduler, LambdaLR):
        return lambda: None
    base, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return lambda: [float(base * factor(step)) for step in range(max_steps)]
