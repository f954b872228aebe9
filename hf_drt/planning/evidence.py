"""What a model's weights show of training: normalisation layers begin constant, and training moves every entry."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.engines import engine_of


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Attributes:
        sign: Which tensor shows training, and by what; None where none does.
        looked: How many tensors could show it.
    """

    sign: str | None
    looked: int


def evidence_of_training(model: nn.Module) -> Evidence:
    """Look at the normalisation layers: weights and biases that are not constant, running statistics that have moved.

    Layers that the model's own initialisation draws at random (EfficientNet's) show nothing, nor does a model without
    such layers, or one whose training left them alone. Collective where FSDP2 has sharded the model.
    """
    with engine_of(model).readable():
        return _found(model)


def _found(model: nn.Module) -> Evidence:
    looked, engine = 0, engine_of(model)
    for prefix, module, name, tensor in _telling(model):
        looked += 1
        if (
            not tensor.is_meta
            and _has_moved(name, engine.full(tensor))
            and not _begins_random(model, prefix, module, name)
        ):
            seen = f"is {int(tensor)}" if tensor.ndim == 0 else "is not constant, as it is at initialisation"
            return Evidence(f"{prefix}.{name} {seen}".lstrip("."), looked)
    return Evidence(None, looked)


def _telling(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """The tensors of normalisation layers that are constant at initialisation, and where they are."""
    for prefix, module in model.named_modules():
        if "norm" not in type(module).__name__.lower():
            continue
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in own.items():
            vector = tensor.ndim == 1 and tensor.numel() > 1 and tensor.is_floating_point()
            if vector or name == "num_batches_tracked":
                yield prefix, module, name, tensor


def _has_moved(name: str, values: Tensor) -> bool:
    return bool(values > 0) if name == "num_batches_tracked" else bool((values != values[0]).any())


def _begins_random(model: nn.Module, prefix: str, module: nn.Module, name: str) -> bool:
    """Whether the initialisation of the part of the model that holds a layer leaves it other than constant."""
    parts = prefix.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    initialise: Any = next((owner._init_weights for owner in owners if hasattr(owner, "_init_weights")), None)
    if initialise is None:
        return False
    fresh = copy.copy(module)  # a small layer of its own, all zeros: what is not initialised stays so
    fresh._parameters = {
        key: p if p is None else nn.Parameter(torch.zeros(p.shape)) for key, p in module._parameters.items()
    }
    fresh._buffers = {
        key: b if b is None else torch.zeros(b.shape, dtype=b.dtype) for key, b in module._buffers.items()
    }
    with torch.random.fork_rng(devices=[]):
        initialise(fresh)
    return _has_moved(name, getattr(fresh, name))
