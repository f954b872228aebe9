"""One optimizer through a change of form: the parameters' places, then each layer's state."""

from collections.abc import Callable

import torch
from torch import nn

from hf_drt.engines import Engine, Single
from hf_drt.forms import Dense, form_of, trainable_weights
from hf_drt.optim.counts import OwnCounts, begun_counts
from hf_drt.optim.groups import spliced_groups
from hf_drt.optim.index import model_order
from hf_drt.optim.matrices import MATRIX, MOMENTUM
from hf_drt.optim.moments import project
from hf_drt.optim.owners import owners, set_owners
from hf_drt.optim.registry import known_rule, rule_of
from hf_drt.optim.rule import Group, MomentKeys, OptimizerRule, State
from hf_drt.targets import Swap


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper, or inside one derived from it. Others that hold one may keep
    state of their own beside it."""
    while any(cls.__module__ == "accelerate.optimizer" for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer  # type: ignore[reportAttributeAccessIssue]
    # Under DeepSpeed that is no optimizer, but stands for one (hf_drt.engines.zero.Regrouped).
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else getattr(optimizer, "outer", optimizer)


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
    rule = rule_of(optimizer)
    OwnCounts.settle(optimizer)
    lists = spliced_groups(optimizer, model, [(swap.name, swap.old, swap.new) for swap in swaps])
    places = model_order(model)
    ordered = [_in_model_order(group["params"], places) for group in optimizer.param_groups]
    rename = _renamed(optimizer.param_groups, model)
    replaced = [(list(trainable_weights(swap.old)), list(trainable_weights(swap.new))) for swap in swaps]

    def commit() -> None:
        places = model_order(model)
        for group, params, sort in zip(optimizer.param_groups, lists, ordered, strict=True):
            if sort:
                _sort_own(params, places)
            group["params"] = params
        rename()
        rule.handed_on(optimizer, replaced)
        replaced.clear()  # each old layer is to be free once its turn is over

    return commit


def _in_model_order(params: list[nn.Parameter], places: dict[int, int]) -> bool:
    """Whether parameters stand in the order in which the model has them. A module lists its own before those of its
    children, and fused experts change between the two, so that the new weights' places are not always the old ones'."""
    found = [places[id(p)] for p in params if id(p) in places]
    return found == sorted(found)


def _sort_own(params: list[nn.Parameter], places: dict[int, int]) -> None:
    """Sort the model's own parameters; those of other models, and whatever else is in the group, keep their indices."""
    own = [index for index, p in enumerate(params) if id(p) in places]
    for index, p in zip(own, sorted((params[i] for i in own), key=lambda p: places[id(p)]), strict=True):
        params[index] = p


def _renamed(groups: list[Group], model: nn.Module) -> Callable[[], None]:
    """The returned function gives the parameters their names after the swaps, in groups that have names: the model's,
    behind what the group's names of now have in front of them, as where two models share a group."""
    named = [group for group in groups if "param_names" in group]
    if not named:
        return lambda: None
    before = {id(p): name for name, p in model.named_parameters()}
    stored = [{id(p): name for p, name in zip(g["params"], g["param_names"], strict=True)} for g in named]
    prefixes = [_prefix(names, before) for names in stored]

    def rename() -> None:
        after = {id(p): name for name, p in model.named_parameters()}
        for group, names, prefix in zip(named, stored, prefixes, strict=True):
            group["param_names"] = [prefix + after[id(p)] if id(p) in after else names[id(p)] for p in group["params"]]

    return rename


def _prefix(stored: dict[int, str], before: dict[int, str]) -> str:
    own = ((stored[key], before[key]) for key in stored if key in before)
    return next((name.removesuffix(bare) for name, bare in own if name.endswith(bare)), "")


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
    if policy == "reset" or not _trained(new):
        return [{} for _ in _trained(new)]
    states = [{key: engine.full(value) for key, value in state.items()} for state in states]
    keys = rule_of(optimizer).moments_of(optimizer)
    return project(whole, new, states, MomentKeys((*keys.first, MOMENTUM), keys.second))


def put_states(optimizer: torch.optim.Optimizer, new: nn.Module, states: list[State], engine: Engine) -> None:
    """Second half of :func:`carry_moments`, laid out as the engine holds the new weights. They must have their shapes,
    from which the optimizer's rule makes the state that its step does not make."""
    optimizer = unwrap(optimizer)
    rule = rule_of(optimizer)
    for weight, state in zip(_trained(new), states, strict=True):
        carried = {key: engine.like(value, weight) for key, value in state.items()}
        if begun := _new_state(optimizer, rule, weight, carried) | carried:
            optimizer.state[weight] = begun
    OwnCounts.install(optimizer)


def _trained(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """The weights of which there is state: none where the form is a frozen W, until that is trained again."""
    form = form_of(layer)
    return () if isinstance(form, Dense) and form.frozen else trainable_weights(layer)


def _new_state(optimizer: torch.optim.Optimizer, rule: OptimizerRule, weight: nn.Parameter, carried: State) -> State:
    """What the optimizer does not make by itself of a weight that it trains; the matrix optimizer's are not its own."""
    if any(weight is p for group in optimizer.param_groups if MATRIX in group for p in group["params"]):
        return {}
    return rule.new_state(optimizer, weight) | begun_counts(optimizer, weight, carried)


def remembered(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The returned function gives the optimizer back the groups, parameters, state and owners that it has now, and
    what others know of its weights."""
    optimizer = unwrap(optimizer)
    OwnCounts.settle(optimizer)
    groups = [(group, group | {"params": list(group["params"])}) for group in optimizer.param_groups]
    states, found = dict(optimizer.state), owners(optimizer)
    rule = known_rule(type(optimizer))  # of any kind: whether it may follow is asked elsewhere
    others = rule.remembered(optimizer) if rule is not None else lambda: None

    def restore() -> None:
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, content in groups:
            group.clear()
            group.update(content)
        optimizer.state.clear()
        optimizer.state.update(states)
        set_owners(optimizer, found)
        others()

    return restore
