"""Parameter groups across a change of form: new parameters take the place of the old ones.

An optimizer's state dict is keyed by position, so the order of ``param_groups`` has to be the one that a fresh
optimizer over the changed model would have, or a checkpoint cannot be resumed.

Forms with a learning rate or multiplier of their own, or with Frobenius decay, live in *form groups*: a copy of their
parent group's options, appended when the optimizer is made and possibly empty, so that the number of groups, which a
learning-rate scheduler fixes at its start, never changes. Where the left and the right factor have different
multipliers, each side has its own.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import layer_of, trainable_weights
from hf_drt.optim.index import KINDS, GroupIndex, model_order
from hf_drt.optim.matrices import MATRIX, MATRIX_LR
from hf_drt.optim.owners import FORM, PARENT, SIDE, Owner, form_groups, mark, number_of
from hf_drt.optim.rule import Group
from hf_drt.optim.sides import Side, side_scales

LR_SCALE, FROBENIUS = "drt_lr_scale", "drt_frobenius_decay"
# The settings that need form groups, with the value at which they need none.
NEED_GROUPS: dict[str, Any] = {
    "factored_lr_scale": 1, "adapter_lr_scale": 1, "left_lr_scale": 1, "right_lr_scale": 1, "frobenius_decay": False,
    "matrix_optimizer": "none",
}  # fmt: skip
GROUP_SETTINGS = " and ".join([", ".join([*NEED_GROUPS][:-1]), [*NEED_GROUPS][-1]])
# What a form group has of the settings, and a scheduler leaves as it is.
_FIXED = (LR_SCALE, MATRIX, MATRIX_LR)

Options = dict[tuple[str, Side], dict[str, Any]]


def form_group_options(config: DRTConfig) -> Options:
    """Options by form and side, of those that need a group of their own; side None is both."""
    options: Options = {}
    if config.uses_matrix_optimizer:
        matrices = {"lr": config.matrix_lr, MATRIX_LR: config.matrix_lr, MATRIX: config.matrix_momentum}
        options = {(form, None): dict(matrices) for form in KINDS.values()}
    for side, scale in side_scales(config).items():
        factored, adapter = config.factored_lr_scale * scale, config.adapter_lr_scale * scale
        if factored != 1 or config.frobenius_decay:
            scaled = {LR_SCALE: factored, FROBENIUS: config.frobenius_decay}
            options["factored", side] = options.get(("factored", side), {}) | scaled
        if adapter != 1:
            options["adapter", side] = options.get(("adapter", side), {}) | {LR_SCALE: adapter}
    return options


def group_settings(config: DRTConfig) -> str:
    """The settings that need form groups, as they are given; empty if none is."""
    return ", ".join(given_of(config, NEED_GROUPS))


def given_of(config: DRTConfig, off: Mapping[str, Any]) -> Iterator[str]:
    """Those of some settings that are on, each with its value; ``off`` has the values at which they are not."""
    for name, value in off.items():
        if getattr(config, name) not in (None, value):
            yield f"{name}={getattr(config, name)}"


def add_form_groups(optimizer: torch.optim.Optimizer, owner: Owner, config: DRTConfig) -> Callable[[], None]:
    """Stage an owner's form groups; the returned function appends them and moves its layers' present weights into them.
    Call both before a scheduler is made.

    There is nothing to do where the configuration needs none. Where they exist already, as of an earlier controller of
    the same model, they are its own now.

    Raises:
        ValueError: As in :meth:`hf_drt.optim.index.GroupIndex.homes`; or a scheduler has counted the groups already; or
            those that exist are for other settings or layers. Nothing has changed then.
    """
    model, options = owner.model(), form_group_options(config)
    present = form_groups(optimizer, owner.number)
    if model is None or (not options and not present):
        return lambda: None
    if not present and any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{group_settings(config)}: this adds parameter groups, but a learning-rate scheduler that counts them has "
            "been made already. Call drt.install(optimizer) before making the scheduler."
            f"{config.without_matrix_optimizer}"
        )
    targets = {name: layer_of(model, name) for name in owner.names}
    index = GroupIndex(optimizer)
    parents = {index.parent(index.homes(name, module)) for name, module in targets.items()}
    if present:
        _check_present(present, parents, options, [w for module in targets.values() for w in trainable_weights(module)])

    def commit() -> None:
        if not present:
            _append(optimizer, sorted(parents), options, mark(owner.number))
        _move(optimizer, owner.number, model, targets)

    return commit


def _move(optimizer: torch.optim.Optimizer, number: int, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    order, index = model_order(model), GroupIndex(optimizer)
    arriving: dict[int, list[list[nn.Parameter]]] = {}
    for name, module in targets.items():
        homes = index.homes(name, module)
        destinations = index.destinations(module, index.parent(homes), number)
        moves = zip(homes, destinations, trainable_weights(module), strict=True)
        for target, weights in _by_group((target, weight) for home, target, weight in moves if home != target):
            arriving.setdefault(target, []).append(weights)
    moved = {id(w) for newcomers in arriving.values() for weights in newcomers for w in weights}
    for position, group in enumerate(optimizer.param_groups):
        stays = [p for p in group["params"] if id(p) not in moved]
        group["params"] = _with_newcomers(stays, arriving.get(position, []), order)


def _by_group(places: Iterable[tuple[int, nn.Parameter]]) -> Iterable[tuple[int, list[nn.Parameter]]]:
    """A layer's weights by the index of the group that each is to be in."""
    found: dict[int, list[nn.Parameter]] = {}
    for number, weight in places:
        found.setdefault(number, []).append(weight)
    return found.items()


def _append(optimizer: torch.optim.Optimizer, parents: list[int], options: Options, marked: Group) -> None:
    for group in optimizer.param_groups:
        group.pop("param_names", None)  # torch refuses to append a group without names to groups with them
    shares = _shares([optimizer.param_groups[parent] for parent in parents])
    for parent, share in zip(parents, shares, strict=True):
        group = optimizer.param_groups[parent]
        for (form, side), extra in options.items():
            copied = {key: _own(value) for key, value in group.items() if key != "params"}
            if extra.get(FROBENIUS):
                extra = extra | {FROBENIUS: copied.get("weight_decay", 0.0), "weight_decay": 0.0}
            if MATRIX in extra:
                extra = extra | {"lr": extra["lr"] * share}
            place = {FORM: form, PARENT: parent} if side is None else {FORM: form, SIDE: side, PARENT: parent}
            optimizer.add_param_group(copied | extra | marked | {"params": [], **place})


def _shares(parents: list[Group]) -> list[float]:
    """Each group's rate over the largest: rates that differ by layer, or are 0, do so for the matrices too."""
    rates = [float(group["lr"] or 0.0) for group in parents]
    return [rate / max(rates) if max(rates) else 1.0 for rate in rates]


def _own(option: Any) -> Any:
    """A rate or count of steps that is a tensor is changed in place, and each group needs its own."""
    return option.clone() if torch.is_tensor(option) else option


def _check_present(present: list[Group], parents: set[int], options: Options, weights: list[nn.Parameter]) -> None:
    """Whether the form groups that are there are those that an owner needs, and hold no other layers."""
    found = {(g[PARENT], g[FORM], g.get(SIDE), *_fixed(g)) for g in present}
    needed = {(parent, *place, *_fixed(group)) for parent in parents for place, group in options.items()}
    own = {id(weight) for weight in weights}
    if found != needed or not all(id(p) in own for group in present for p in group["params"]):
        raise ValueError(
            "the optimizer has parameter groups of an earlier DynamicRank of this model, with other layers or other "
            f"values of {GROUP_SETTINGS} (with matrix_lr and matrix_momentum); these decide the groups, which cannot "
            "change. Make a new optimizer, or keep the settings."
        )


def _fixed(group: dict[str, Any]) -> tuple[Any, ...]:
    """A form group's settings; the decay itself is the optimizer's."""
    return *(group.get(key) for key in _FIXED), group.get(FROBENIUS, False) is not False


def spliced_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, swaps: list[tuple[str, nn.Module, nn.Module]]
) -> list[list[nn.Parameter]]:
    """The parameter lists of all groups after the swaps ``(name, old, new)``; nothing is changed.

    Within a group the new weights take the old ones' index. Between groups they go in front of the first parameter
    that follows them in the model.

    Raises:
        ValueError: As :meth:`hf_drt.optim.index.GroupIndex.homes`.
    """
    order, index = model_order(model), GroupIndex(optimizer)
    replaced: dict[int, list[nn.Parameter]] = {}
    arriving: dict[int, list[list[nn.Parameter]]] = {}
    for name, old, new in swaps:
        homes = index.homes(name, old)
        destinations = index.destinations(new, index.parent(homes), number_of(optimizer, model, name))
        old_weights, new_weights = trainable_weights(old), trainable_weights(new)
        # The frozen base too, where the optimizer was made over all parameters: it would stand there twice as W.
        leaving = [id(p) for p in old._parameters.values() if p is not None and p is not old.bias]
        place = min(order[key] for key in leaving)
        order.update((id(p), place) for p in new_weights)
        replaced.update((key, []) for key in leaving)
        for target, weights in _by_group(zip(destinations, new_weights, strict=True)):
            if target in homes:
                replaced[id(old_weights[homes.index(target)])] = weights
            else:
                arriving.setdefault(target, []).append(weights)
    lists = [[q for p in group["params"] for q in replaced.get(id(p), [p])] for group in optimizer.param_groups]
    return [_with_newcomers(params, arriving.get(number, []), order) for number, params in enumerate(lists)]


def _with_newcomers(
    params: list[nn.Parameter], newcomers: list[list[nn.Parameter]], order: dict[int, int]
) -> list[nn.Parameter]:
    """A group's parameters, and each layer's new weights in front of the first of the model's that follows them there,
    else behind the last of the model's; those of another model, which have no place in ``order``, stay together."""
    if not newcomers:
        return params
    places = [order.get(id(p), -1) for p in params]
    furthest = list(accumulate(places, max))  # so that the first place beyond another is found by halving
    last = max((i + 1 for i, found in enumerate(places) if found >= 0), default=len(params))
    merged, taken = [], 0
    for weights in sorted(newcomers, key=lambda weights: order[id(weights[0])]):
        index = bisect_right(furthest, order[id(weights[0])])
        index = index if index < len(params) else last
        merged += [*params[taken:index], *weights]
        taken = max(taken, index)
    return merged + params[taken:]
