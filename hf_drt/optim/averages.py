"""Optimizers that train at other weights than those that they make, through a change of form.

A schedule-free optimizer (Defazio et al. 2024) takes gradients at ``y = (1 - beta) z + beta x``, between the iterate z
and the average x, which is the one to evaluate. The parameters hold y in training, and x after ``optimizer.eval()``. So
a layer changes form at its x: what is evaluated stays the same. Its new weights are x, y and z at once, as those of a
new optimizer: z and the average begin anew.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from hf_drt.forms import trainable_weights
from hf_drt.optim.carry import unwrap
from hf_drt.optim.registry import rule_of


@contextlib.contextmanager
def at_averages(optimizer: torch.optim.Optimizer | None, layers: Iterable[nn.Module]) -> Iterator[None]:
    """In the block the layers' trainable weights are those to evaluate; they are to be replaced in it. After an
    exception they are what they were, bit for bit, for which copies are kept where the gradients have been.

    Raises:
        ValueError: The optimizer is not supported. Nothing has changed then.
    """
    optimizer = None if optimizer is None else unwrap(optimizer)
    if optimizer is None or not rule_of(optimizer).averages:
        yield
        return
    weights = [weight for layer in layers for weight in trainable_weights(layer)]
    put_back = _copied(weights)
    _evaluate(optimizer, weights)
    del weights
    try:
        yield
    except BaseException:
        put_back()
        raise


def _copied(weights: list[nn.Parameter]) -> Callable[[], None]:
    """The returned function gives the weights that there still are their present values. It keeps none alive: a copy
    goes with its weight."""
    kept: dict[int, Tensor] = {}
    held = []
    for index, weight in enumerate(weights):
        kept[index] = weight.detach().clone()
        held.append(weakref.ref(weight, lambda _, index=index: kept.pop(index, None)))

    @torch.no_grad()
    def put_back() -> None:
        for index, reference in enumerate(held):
            weight = reference()
            if weight is not None and weight.shape == kept[index].shape:  # not one that was emptied halfway
                weight.copy_(kept[index])

    return put_back


def _evaluate(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """``optimizer.eval()`` for some weights alone."""
    groups, wanted = optimizer.param_groups, {id(weight) for weight in weights}
    try:
        optimizer.param_groups = [g | {"params": [p for p in g["params"] if id(p) in wanted]} for g in groups]
        optimizer.eval()  # type: ignore[reportAttributeAccessIssue]  # the rule says that it is there
    finally:
        optimizer.param_groups = groups
