"""The learning rate of every update step, before the run: what a plain Trainer would log for it.

A scheduler is stepped over an optimizer without a model. The Trainer steps its scheduler once an update, whatever the
accumulation and the number of processes, and logs ``scheduler.get_last_lr()[0]``, the rate of the first group.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers.optimization import GreedyLR

from hf_drt.optim import unwrap

logger = logging.getLogger(__name__)

Curve = Callable[[], list[float] | None]
Groups = list[dict[str, Any]]

_FOLLOW_A_METRIC = (ReduceLROnPlateau, GreedyLR)  # the Trainer steps them after an evaluation
_NOT_OPTIONS = ("params", "param_names")


class StandIn(torch.optim.Optimizer):
    """An optimizer without a model, for a scheduler to be stepped over.

    Args:
        groups: Options of its parameter groups; they are copied.
        defaults: The optimizer's own, in which some schedulers look for its momentum.
    """

    def __init__(self, groups: Groups, defaults: dict[str, Any]):
        groups = [copy.deepcopy(options) | {"params": [torch.nn.Parameter(torch.zeros(1))]} for options in groups]
        super().__init__(groups, copy.deepcopy(defaults))

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "StandIn":
        """One with the options that the optimizer's groups have now."""
        return cls(group_options(optimizer), optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        """Nothing: there is nothing to train."""


def group_options(optimizer: torch.optim.Optimizer) -> Groups:
    """A copy of all that the groups hold but their parameters; a scheduler may read any of it."""
    return [
        copy.deepcopy({key: value for key, value in group.items() if key not in _NOT_OPTIONS})
        for group in optimizer.param_groups
    ]


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes a gradient scaler's word for an overflow itself, so that its step is always called.

    Without that, the Trainer does not step its scheduler in an update that a scaler leaves out, and counts it.
    """
    return bool(getattr(unwrap(optimizer), "_step_supports_amp_scaling", False))


def simulated_curve(make: Callable[[torch.optim.Optimizer], Any], lr: float, max_steps: int) -> Curve:
    """LR curve of the scheduler that ``make`` builds over an optimizer of one learning rate.

    The curve is None where the scheduler follows a metric, and so cannot be known beforehand.
    """
    return lambda: stepped(make(StandIn([{"lr": lr}], {"lr": lr})), max_steps)


def existing_curve(scheduler: Any, max_steps: int) -> Curve:
    """LR curve of a scheduler that exists already, from where it stands: a copy of it is stepped.

    None where it follows a metric, cannot be copied, or does not get to ``max_steps``; the log says why.
    """

    def curve() -> list[float] | None:
        try:
            return stepped(twin(scheduler), max_steps)
        except Exception as error:  # of any kind: schedulers and their functions may be the user's own
            logger.warning(
                "the learning rate of %s is not known before the run: %s: %s",
                type(scheduler).__name__, type(error).__name__, error,
            )  # fmt: skip
            return None

    return curve


def stepped(scheduler: Any, max_steps: int) -> list[float] | None:
    """What the Trainer would log in ``max_steps`` updates; the scheduler is at their end then.

    None where it follows a metric, or is of a kind of which that is not known.
    """
    if isinstance(scheduler, _FOLLOW_A_METRIC) or not isinstance(scheduler, LRScheduler):
        return None
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stand-in is never stepped itself
        for step in range(max_steps):
            if step:
                scheduler.step()
            rates.append(float(scheduler.get_last_lr()[0]))
    return rates


def twin(scheduler: Any) -> Any:
    """A copy of a scheduler over a stand-in of its optimizer; one that follows a metric is returned as it is."""
    if isinstance(scheduler, _FOLLOW_A_METRIC) or not isinstance(scheduler, LRScheduler):
        return scheduler
    real = scheduler.optimizer
    stand_in = StandIn.of(real)
    shared = {id(owner): owner for owner in _owners(scheduler)}
    return copy.deepcopy(scheduler, shared | {id(real): stand_in, id(unwrap(real)): stand_in})


def _owners(scheduler: LRScheduler) -> Iterator[Any]:
    """Whose methods a scheduler calls, as the trainer's in ``LambdaLR(optimizer, self.rate)``: not to be copied."""
    for value in vars(scheduler).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, LRScheduler):
                yield from _owners(item)
            elif isinstance(item, MethodType) and not isinstance(item.__self__, LRScheduler):
                yield item.__self__


@contextlib.contextmanager
def untouched(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """After the block, all options of the optimizer's groups, and its attributes, are what they were: making a
    scheduler over it sets rates and momentum, and wraps its ``step``."""
    if optimizer is None:
        yield
        return
    groups = list(optimizer.param_groups)
    kept = [(d, dict(d)) for d in (*groups, vars(optimizer), vars(unwrap(optimizer)))]
    tensors = [(value, value.clone()) for group in groups for value in group.values() if torch.is_tensor(value)]
    try:
        yield
    finally:
        for present, before in kept:
            _restore(present, before)
        unwrap(optimizer).param_groups[:] = groups
        for tensor, before in tensors:  # torch fills a rate that is a tensor in place
            tensor.copy_(before)


def _restore(present: dict[str, Any], before: dict[str, Any]) -> None:
    for key in set(present) - set(before):
        del present[key]
    present.update(before)
