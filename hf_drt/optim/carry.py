"""carry_state: one optimizer through a change of form."""

from collections.abc import Callable

import torch
from torch import nn

from hf_drt.forms import trainable_weights
from hf_drt.optim.groups import spliced_groups
from hf_drt.optim.moments import moment_keys, project
from hf_drt.surgery import Swap


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside a wrapper such as Accelerate's, whose ``optimizer`` attribute holds it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def carry_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, swaps: list[Swap], policy: str
) -> Callable[[], None]:
    """Stage the optimizer's part of a change of form; the returned function puts it in force, after the model's.

    Args:
        optimizer: Holds the trainable weights of every ``swap.old``.
        model: The model before the swaps.
        swaps: Layers that change form; the values of ``swap.new``'s trainable low-rank weights must be set.
        policy: 'project' carries the moments over (:mod:`hf_drt.optim.moments`), 'reset' drops them. The state of
            every other parameter is kept in both.

    Raises:
        ValueError: The optimizer is not supported, or lacks a weight. Nothing has changed then.
    """
    optimizer = unwrap(optimizer)
    keys = moment_keys(optimizer)
    lists = spliced_groups(optimizer, model, [(swap.name, swap.old, swap.new) for swap in swaps])
    states = {}
    if policy == "project":
        for swap in swaps:
            old = [optimizer.state.get(weight, {}) for weight in trainable_weights(swap.old)]
            with torch.no_grad():
                states |= dict(zip(trainable_weights(swap.new), project(swap.old, swap.new, old, keys), strict=True))

    def commit() -> None:
        for swap in swaps:
            for weight in trainable_weights(swap.old):
                optimizer.state.pop(weight, None)
        optimizer.state.update({weight: state for weight, state in states.items() if state})
        names = {id(p): name for name, p in model.named_parameters()}
        for group, params in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = params
            if "param_names" in group:
                group["param_names"] = [names[id(p)] for p in params]

    return commit


def remembered(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The returned function gives the optimizer back the parameters and state that it has now."""
    optimizer = unwrap(optimizer)
    lists = [group["params"] for group in optimizer.param_groups]
    states = dict(optimizer.state)

    def restore() -> None:
        for group, params in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = params
        optimizer.state.clear()
        optimizer.state.update(states)

    return restore
