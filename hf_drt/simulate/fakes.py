"""Tensors without data in place of a module's own."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def without_data(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter and buffer is a fake tensor on the CPU; ties between modules stay."""
    places = [
        (holder, key, tensor)
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for key, tensor in holder.items()
        if tensor is not None
    ]
    fakes = {id(tensor): _fake(tensor) for _, _, tensor in places}
    training = [(module, module.training) for module in model.modules()]
    for holder, key, tensor in places:
        holder[key] = fakes[id(tensor)]
    try:
        yield
    finally:
        for holder, key, tensor in places:
            holder[key] = tensor
        for module, mode in training:
            module.training = mode


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
