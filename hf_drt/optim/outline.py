"""Outlines of layers in an optimizer, which hold the places of weights that are yet to be made."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from hf_drt.forms import trainable_weights
from hf_drt.optim.carry import unwrap


def stand_ins(
    optimizer: torch.optim.Optimizer, outlines: Iterable[nn.Module]
) -> Callable[[nn.Module, nn.Module], None]:
    """The returned function gives a layer's trainable weights the places that its outline's have in the optimizer."""
    wanted = {id(weight) for outline in outlines for weight in trainable_weights(outline)}
    places = {
        id(p): (group["params"], index)
        for group in unwrap(optimizer).param_groups
        for index, p in enumerate(group["params"])
        if id(p) in wanted
    }

    def substitute(outline: nn.Module, new: nn.Module) -> None:
        for weight, own in zip(trainable_weights(outline), trainable_weights(new), strict=True):
            params, index = places[id(weight)]
            params[index] = own

    return substitute
