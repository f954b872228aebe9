"""A model in any mix of forms as an ordinary dense one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_drt.checkpoint import undeclared
from hf_drt.forms import (
    FormedLinear,
    FrozenLinear,
    LowRankLinear,
    decomposed_dtype,
    in_one_dtype,
    merged,
    rounding,
    split_attentions,
)
from hf_drt.linalg import working_dtype
from hf_drt.targets import Swap, replace

L = TypeVar("L", bound=FormedLinear)


def dense_state_dict(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict under the names of the dense model; the model itself stays as it is.

    Low-rank layers are merged in float32 (or better) and cast once. The result loads into the model's original class
    without this package. What the cast costs in half precision: :func:`merge_errors`.

    Args:
        model: In any mix of forms.
        state: Its state dict where that has been gathered already, as of a sharded model; may be empty on a process
            that gets none.
    """
    merged = dict(model.state_dict() if state is None else state)
    for name, layer in low_rank_layers(model):
        tensors = {key: merged.pop(f"{name}.{key}") for key in layer.tensors if f"{name}.{key}" in merged}
        if len(tensors) == len(layer.tensors):
            merged[layer.dense_key(name)] = _stored(layer, tensors)
    for name, layer in _layers_of(model, FrozenLinear):
        if (weight := merged.get(f"{name}.weight")) is not None:
            merged[f"{name}.weight"] = weight.to(layer.dtype)
    for name, attention in split_attentions(model):
        attention.pack(merged, f"{name}." if name else "")
    return merged


def dense_weight(layer: LowRankLinear) -> Tensor:
    """The effective W of a layer in the dense layout, merged in float32 or better and cast once."""
    tensors: dict[str, Tensor] = {key: layer.get_parameter(key) for key in layer.tensors}
    return _stored(layer, tensors)


@contextlib.contextmanager
def presented(model: nn.Module, weight: Callable[[LowRankLinear], Tensor] = dense_weight) -> Iterator[None]:
    """In the block the model is an ordinary dense one, so that whatever saves it, in whatever way, writes that.

    The low-rank layers themselves come back afterwards, untouched; the optimizer never sees the dense ones. It takes
    the memory of all dense weights, as :func:`dense_state_dict` does. Not for a sharded model.

    Args:
        model: Unwrapped, in any mix of forms; a container of transformers' models as well.
        weight: Gives the dense weight of a layer; by default what it computes with.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FormedLinear)}
    frozen = {name: _whole(layer) for name, layer in layers.items() if isinstance(layer, FrozenLinear)}
    weights = frozen | {name: weight(layer) for name, layer in layers.items() if isinstance(layer, LowRankLinear)}
    swaps = [
        Swap(name, layer, layer.dense_with(nn.Parameter(weights.pop(name).detach(), requires_grad=False)))
        for name, layer in layers.items()
    ]
    with undeclared(model):
        replace(model, swaps)
        try:
            yield
        finally:
            replace(model, [Swap(swap.name, swap.new, swap.old) for swap in swaps])


def merge_errors(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, float]:
    """What the cast at the end of :func:`dense_state_dict` costs, by low-rank layer; the model stays as it is.

    It is ``||cast(W) - W||_F / ||W - base||_F`` with W merged in float32, and base = 0 for factors: the share of what
    the factors hold that the dense weight loses. 0 in float32; 1 where an adapter's update is lost in half precision.

    Args:
        model, state: As there; empty where the state is.
    """
    state = model.state_dict() if state is None else state
    errors = {}
    for name, layer in low_rank_layers(model):
        tensors = {key: state[f"{name}.{key}"] for key in layer.tensors if f"{name}.{key}" in state}
        if len(tensors) == len(layer.tensors):
            errors[name] = _merge_error(layer, tensors)
    return errors


def marked_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered state dict with the entry of no elements that keeps plain transformers from loading low-rank layers as
    random ones (:class:`hf_drt.forms.LowRankLinear`); a sharded model's own state has none."""
    marks = {}
    for name, layer in low_rank_layers(model):
        if (tensor := state.get(f"{name}.{layer.tensors[0]}")) is not None:
            marks[layer.dense_key(name)] = tensor.new_empty(layer.layout.shape(0, layer.in_features))
    return state | marks


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Every low-rank layer under every name that its tensors have in the state dict."""
    return _layers_of(model, LowRankLinear)


def _layers_of(model: nn.Module, kind: type[L]) -> Iterator[tuple[str, L]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            yield name.replace("_checkpoint_wrapped_module.", ""), module


def _whole(layer: FrozenLinear) -> Tensor:
    return layer.kept.to(layer.dtype)


def _stored(layer: LowRankLinear, tensors: dict[str, Tensor]) -> Tensor:
    """W as the dense layer stores it, in the dtype in which the layer is trained."""
    return layer.layout.stored(_merged(layer, tensors)).to(_dtype(layer, tensors)).contiguous()


def _dtype(layer: LowRankLinear, tensors: dict[str, Tensor]) -> torch.dtype:
    """Of the factors, since an adapter's base may be kept in fewer bits."""
    return tensors[layer.path[0]].dtype


def _merge_error(layer: LowRankLinear, tensors: dict[str, Tensor]) -> float:
    dtype = _dtype(layer, tensors)
    if dtype == working_dtype(dtype):  # nothing is cast, so spare the product
        return 0.0
    W, base = _merged(layer, tensors), _whole_tensors(tensors).get("base")
    return rounding(W, W.to(dtype), None if base is None else layer.layout.matrix(base))


def _merged(layer: LowRankLinear, tensors: dict[str, Tensor]) -> Tensor:
    """``W (out, in)`` from the layer's tensors, in float32 or better."""
    with torch.no_grad():
        return merged(layer.form, _whole_tensors(tensors), layer.layout)


def _whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return in_one_dtype(tensors, decomposed_dtype(tensors))
