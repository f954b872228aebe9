"""What an average is taken of: every weight of a model under its dense name, whatever its layer's form is now."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_drt.forms import FROZEN, FormedLinear, FrozenLinear, LowRankLinear, effective_weight, weight_shape

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what activation checkpointing and the compiler put between


@dataclass(frozen=True)
class Weight:
    """A weight of the model: a tensor that it has, or what a layer in another form makes up.

    Attributes:
        key: Its name in the state dict of the dense model.
        source: The parameter or buffer; or the layer.
        place: Of a layer, its name in the model.
    """

    key: str
    source: Tensor | FormedLinear
    place: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the dense model stores it."""
        if isinstance(self.source, Tensor):
            return tuple(self.source.shape)
        return self.source.layout.shape(*weight_shape(self.source))

    def whole(self) -> Tensor:
        """The weight of now, in the dense layout and in float32 or better."""
        if isinstance(self.source, Tensor):
            return self.source.detach()
        return self.source.layout.stored(effective_weight(self.source))


def weights_of(model: nn.Module, known: Container[str] = (), buffers: bool = False) -> dict[str, Weight]:
    """The weights that are trained, or may be in another form of their layer, by dense name; tied ones once.

    Args:
        model: Unwrapped, in any mix of forms.
        known: Names of further parameters, which are frozen now.
        buffers: Whether buffers that are saved belong to them.
    """
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for weight, trains in _all(model, buffers):
        if id(weight.source) not in seen and (trains or weight.key in known):
            found[weight.key] = weight
        seen.add(id(weight.source))
    return found


def _all(model: nn.Module, buffers: bool) -> Iterator[tuple[Weight, bool]]:
    for place, module in model.named_modules():
        name = _plain(place)
        own = module._parameters.items()
        if isinstance(module, FormedLinear):
            key = module.dense_key(name) if isinstance(module, LowRankLinear) else f"{name}.weight"
            yield Weight(key, module, place), not (isinstance(module, FrozenLinear) and module.by_user)
            own = [("bias", module.bias)]
        yield from (
            (Weight(f"{name}.{leaf}".lstrip("."), p), p.requires_grad or _is_frozen_by_form(module, leaf))
            for leaf, p in own
            if p is not None
        )
        if buffers:
            yield from (
                (Weight(f"{name}.{leaf}".lstrip("."), tensor), True)
                for leaf, tensor in module._buffers.items()
                if tensor is not None and leaf not in module._non_persistent_buffers_set
            )


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_frozen_by_form(module: nn.Module, leaf: str) -> bool:
    """Whether a dense W is frozen for a phase alone."""
    mark = vars(module).get(FROZEN)
    by_user = mark if isinstance(mark, dict) else {"weight": mark}  # of fused experts by parameter
    return by_user.get(leaf) is False


def averaged_dtype(tensor: Tensor) -> torch.dtype:
    """That in which a tensor is averaged: float32 or better; whole numbers, which are copied, keep theirs."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.float32)
    return tensor.dtype
