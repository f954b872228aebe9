"""One optimizer through a change of form: the parameters' places, then each layer's state."""

from collections.abc import Callable

import torch
from torch import nn

from hf_drt.engines import Engine, Single
from hf_drt.forms import trainable_weights
from hf_drt.optim.groups import spliced_groups
from hf_drt.optim.moments import State, moment_keys, project
from hf_drt.optim.owners import Group, owners, set_owners
from hf_drt.targets import Swap


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside a wrapper such as Accelerate's, whose ``optimizer`` attribute holds it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def carry_groups(optimizer: torch.optim.Optimizer, model: nn.Module, swaps: list[Swap]) -> Callable[[], None]:
    """Stage the new parameters' places in the optimizer; the returned function puts them in force, after the model's.

    Args:
        optimizer: Holds the trainable weights of every ``swap.old``.
        model: The model before the swaps.
        swaps: Layers that change form.

    Raises:
        ValueError: The optimizer is not supported, or lacks a weight. Nothing has changed then.
    """
    optimizer = unwrap(optimizer)
    moment_keys(optimizer)
    lists = spliced_groups(optimizer, model, [(swap.name, swap.old, swap.new) for swap in swaps])
    ordered = [_in_model_order(group["params"], model) for group in optimizer.param_groups]
    named = [_named(group, model) for group in optimizer.param_groups]

    def commit() -> None:
        places = {id(p): place for place, p in enumerate(model.parameters())}
        for group, params, sort, name in zip(optimizer.param_groups, lists, ordered, named, strict=True):
            if sort:
                _sort_own(params, places)
            group["params"] = params
            name(group)

    return commit


def _in_model_order(params: list[nn.Parameter], model: nn.Module) -> bool:
    """Whether parameters stand in the order in which the model has them. A module lists its own before those of its
    children, and fused experts change between the two, so that the new weights' places are not always the old ones'."""
    places = {id(p): place for place, p in enumerate(model.parameters())}
    found = [places[id(p)] for p in params if id(p) in places]
    return found == sorted(found)


def _sort_own(params: list[nn.Parameter], places: dict[int, int]) -> None:
    """Sort the model's own parameters; those of other models, and whatever else is in the group, keep their indices."""
    own = [index for index, p in enumerate(params) if id(p) in places]
    for index, p in zip(own, sorted((params[i] for i in own), key=lambda p: places[id(p)]), strict=True):
        params[index] = p


def _named(group: Group, model: nn.Module) -> Callable[[Group], None]:
    """The returned function gives the group's parameters their names after the swaps, where it has names: the model's,
    behind what the names of now have in front of them, as where two models share a group."""
    if "param_names" not in group:
        return lambda group: None
    stored = {id(p): name for p, name in zip(group["params"], group["param_names"], strict=True)}
    before = {id(p): name for name, p in model.named_parameters()}
    own = ((stored[key], before[key]) for key in stored if key in before)
    prefix = next((name.removesuffix(bare) for name, bare in own if name.endswith(bare)), "")

    def rename(group: Group) -> None:
        names = stored | {id(p): prefix + name for name, p in model.named_parameters()}
        group["param_names"] = [names[id(p)] for p in group["params"]]

    return rename


def carry_moments(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module, policy: str) -> None:
    """One layer's optimizer state: the old weights' is dropped, the new ones' begins.

    Args:
        optimizer: As in :func:`carry_groups`.
        old, new: The layer before and after; the low-rank weights of both must have their values.
        policy: 'project' carries the moments over (:mod:`hf_drt.optim.moments`), 'reset' starts anew.
    """
    engine = Single(new)
    put_states(optimizer, new, take_states(optimizer, old, new, policy, engine, old), engine)


@torch.no_grad()
def take_states(
    optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module, policy: str, engine: Engine, whole: nn.Module
) -> list[State]:
    """First half of :func:`carry_moments`: drop the old weights' state, and return the new ones'. Collective where the
    engine is.

    Args:
        engine: Holds ``old`` and its state, not ``new`` yet.
        whole: The old layer with whole weights.
    """
    optimizer = unwrap(optimizer)
    states = [optimizer.state.pop(weight, {}) for weight in trainable_weights(old)]
    if policy == "reset":
        return [{} for _ in trainable_weights(new)]
    states = [{key: engine.full(value) for key, value in state.items()} for state in states]
    return project(whole, new, states, moment_keys(optimizer))


def put_states(optimizer: torch.optim.Optimizer, new: nn.Module, states: list[State], engine: Engine) -> None:
    """Second half of :func:`carry_moments`, laid out as the engine holds the new weights."""
    optimizer = unwrap(optimizer)
    for weight, state in zip(trainable_weights(new), states, strict=True):
        if state:
            optimizer.state[weight] = {key: engine.like(value, weight) for key, value in state.items()}


def remembered(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The returned function gives the optimizer back the groups, parameters, state and owners that it has now."""
    optimizer = unwrap(optimizer)
    groups = [(group, group | {"params": list(group["params"])}) for group in optimizer.param_groups]
    states, found = dict(optimizer.state), owners(optimizer)

    def restore() -> None:
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, content in groups:
            group.clear()
            group.update(content)
        optimizer.state.clear()
        optimizer.state.update(states)
        set_owners(optimizer, found)

    return restore
