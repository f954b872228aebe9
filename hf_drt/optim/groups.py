"""Parameter groups across a change of form: new parameters take the place of the old ones.

An optimizer's state dict is keyed by position, so the order of ``param_groups`` has to be the one that a fresh
optimizer over the changed model would have, or a checkpoint cannot be resumed.

Forms with a learning-rate multiplier or with Frobenius decay live in *form groups*: a copy of their parent group's
options, appended when the optimizer is made and possibly empty, so that the number of groups, which a learning-rate
scheduler fixes at its start, never changes.
"""

from typing import Any

import torch
from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import Adapter, Factored, Form, form_of, trainable_weights

FORM, PARENT, LR_SCALE, FROBENIUS = "drt_form", "drt_parent", "drt_lr_scale", "drt_frobenius_decay"


def form_group_options(config: DRTConfig) -> dict[str, dict[str, Any]]:
    """Options by form, of those forms that need a group of their own."""
    options: dict[str, dict[str, Any]] = {}
    if config.factored_lr_scale != 1 or config.frobenius_decay:
        options["factored"] = {LR_SCALE: config.factored_lr_scale, FROBENIUS: config.frobenius_decay}
    if config.adapter_lr_scale != 1:
        options["adapter"] = {LR_SCALE: config.adapter_lr_scale}
    return options


def add_form_groups(optimizer: torch.optim.Optimizer, targets: dict[str, nn.Module], config: DRTConfig) -> None:
    """Append the form groups and move the targets' present weights into them. Call it before a scheduler is made.

    Does nothing where the configuration needs none, or where they exist already.

    Raises:
        ValueError: As in :func:`locate`.
    """
    options = form_group_options(config)
    if not options or any(FORM in group for group in optimizer.param_groups):
        return
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "factored_lr_scale, adapter_lr_scale and frobenius_decay add parameter groups, but a learning-rate "
            "scheduler that counts them has been made already. Call drt.install(optimizer) before making the scheduler."
        )
    for group in optimizer.param_groups:
        group.pop("param_names", None)  # torch refuses to append a group without names to groups with them
    homes = {name: locate(optimizer, name, module)[0] for name, module in targets.items()}
    for parent in sorted(set(homes.values())):
        group = optimizer.param_groups[parent]
        for form, extra in options.items():
            copied = {key: value for key, value in group.items() if key != "params"}
            if extra.get(FROBENIUS):
                extra = extra | {FROBENIUS: copied.get("weight_decay", 0.0), "weight_decay": 0.0}
            optimizer.add_param_group(copied | extra | {"params": [], FORM: form, PARENT: parent})
    for name, module in targets.items():
        home, target = homes[name], destination(optimizer, homes[name], form_of(module))
        if home != target:
            weights = trainable_weights(module)
            moved = {id(w) for w in weights}
            group = optimizer.param_groups[home]
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.param_groups[target]["params"].extend(weights)


def locate(optimizer: torch.optim.Optimizer, name: str, module: nn.Module) -> tuple[int, int]:
    """Index of the group, and the position in it, of a layer's first trainable weight.

    Raises:
        ValueError: A trainable weight of the layer is not in the optimizer, or they are in several groups.
    """
    places = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    weights = trainable_weights(module)
    if not all(id(weight) in places for weight in weights):
        raise ValueError(
            f"the weights of {name} are not in the optimizer. Make it after the first phase is in force, as in "
            "drt.apply(0), over all trainable parameters; or pass it there: drt.apply(0, optimizer). To leave the "
            "layer out of dynamic-rank training use exclude=."
        )
    if len({places[id(weight)][0] for weight in weights}) > 1:
        raise ValueError(
            f"the weights of {name} are in different parameter groups of the optimizer, but change form together. Put "
            "them into one; for a learning rate of their own use factored_lr_scale or adapter_lr_scale."
        )
    return places[id(weights[0])]


def destination(optimizer: torch.optim.Optimizer, home: int, form: Form) -> int:
    """Index of the group in which a layer of the given form belongs, whose weights now are in group ``home``."""
    parent = optimizer.param_groups[home].get(PARENT, home)
    kind = {Factored: "factored", Adapter: "adapter"}.get(type(form))
    for index, group in enumerate(optimizer.param_groups):
        if kind is not None and group.get(FORM) == kind and group[PARENT] == parent:
            return index
    return parent


def spliced_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, swaps: list[tuple[str, nn.Module, nn.Module]]
) -> list[list[nn.Parameter]]:
    """The parameter lists of all groups after the swaps ``(name, old, new)``; nothing is changed.

    Within a group the new weights take the old ones' index. Between groups they go in front of the first parameter
    that follows them in the model.
    """
    order = {id(p): i for i, p in enumerate(model.parameters())}
    replaced: dict[int, list[nn.Parameter]] = {}
    arriving: dict[int, list[list[nn.Parameter]]] = {}
    for name, old, new in swaps:
        home, _ = locate(optimizer, name, old)
        target = destination(optimizer, home, form_of(new))
        old_weights, new_weights = trainable_weights(old), list(trainable_weights(new))
        place = min(order[id(p)] for p in old.parameters() if p is not old.bias)
        order |= {id(p): place for p in new_weights}
        # The frozen base too, where the optimizer was made over all parameters: it would stand there twice as W.
        replaced |= {id(p): [] for p in old.parameters() if p is not old.bias}
        if home == target:
            replaced[id(old_weights[0])] = new_weights
        else:
            arriving.setdefault(target, []).append(new_weights)
    lists = [[q for p in group["params"] for q in replaced.get(id(p), [p])] for group in optimizer.param_groups]
    for target, newcomers in arriving.items():
        for weights in newcomers:
            _insert_in_order(lists[target], weights, order)
    return lists


def _insert_in_order(params: list[nn.Parameter], weights: list[nn.Parameter], order: dict[int, int]) -> None:
    place = order[id(weights[0])]
    index = next((i for i, p in enumerate(params) if order.get(id(p), -1) > place), len(params))
    params[index:index] = weights
