"""Layers as they are now, to be put back bit for bit."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hf_drt.forms import AdapterLinear, layer_of
from hf_drt.targets import Swap, replace


def remembered_layers(model: nn.Module, layers: Mapping[str, nn.Module], principal: bool) -> Callable[[], None]:
    """The returned function puts these layers back into the model, with their values and flags of now.

    They live as long as it does. Of weights that a change of form writes to (W under an adapter that takes its
    principal directions, an adapter's base where it is merged) it keeps a copy.

    Args:
        model: That has them.
        layers: By name.
        principal: Whether adapters of the run take principal directions.
    """
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    flags = [p.requires_grad for p in parameters]
    written = [p for m in layers.values() if principal or isinstance(m, AdapterLinear) for p in m.parameters()]
    values = [p.detach().clone() for p in written]

    def restore() -> None:
        now = {name: layer_of(model, name) for name in layers}
        replace(model, [Swap(name, now[name], old) for name, old in layers.items() if now[name] is not old])
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, value in zip(written, values, strict=True):
                parameter.copy_(value)

    return restore
