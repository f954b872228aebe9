"""A model that shows its average for a time, and is itself again afterwards: the same layers, objects and bits."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_drt.checkpoint import undeclared
from hf_drt.ema.weights import Weight
from hf_drt.forms import SHOWN, FormedLinear, LowRankLinear, stack_count, trained_dtype
from hf_drt.targets import Places

_INSIDE = "within `with ema.averaged()` the model shows its average"


@contextlib.contextmanager
def shown(model: nn.Module, averages: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> Iterator[None]:
    """In the block the model is a dense one of averaged weights, in its own dtype and on its devices.

    A plain parameter stays the object that it is and has other values; a layer in another form steps aside for a dense
    one. An average of the model's own dtype is not copied. Gradients are set aside, and steps of an optimizer over the
    model's parameters are refused.

    Args:
        model: Unwrapped.
        averages: By dense name.
        weights: Of the model as it is now, of the same names.

    Raises:
        RuntimeError: The model has changed form in the block. It is as it was before all the same.
    """
    layers = {w.place: w.source for w in weights.values() if isinstance(w.source, FormedLinear)}
    dense = {
        w.place: _stand_in(w.source, averages[key]) for key, w in weights.items() if isinstance(w.source, FormedLinear)
    }
    places = Places(model, layers)
    plain = [(w.source, averages[key]) for key, w in weights.items() if isinstance(w.source, Tensor)]
    with undeclared(model), _marked(model), _refused_steps(model), _eager(bool(dense)), _lent(plain):
        places.put(dense)
        try:
            yield
        finally:
            replaced = _replaced(model, dense)
            places.put(layers)
            _take_over_mode(dense, layers)
    if replaced:
        raise RuntimeError(
            f"{_INSIDE}, and cannot change form: a layer was replaced there. The model is as it was before."
        )


def _stand_in(layer: FormedLinear, average: Tensor) -> nn.Module:
    """The dense layer of an average. It takes part in no training."""
    like = next(layer.parameters())
    return layer.dense_with(nn.Parameter(average.to(like.device, trained_dtype(layer)), requires_grad=False))


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """In the block a change of form is refused (:func:`hf_drt.transition.change_forms`): it would miss the layers."""
    vars(model)[SHOWN] = True
    try:
        yield
    finally:
        del vars(model)[SHOWN]


@contextlib.contextmanager
def _lent(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In the block these tensors have the values of others, and parameters no gradients."""
    kept = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for tensor, _ in pairs]
    try:
        for tensor, average in pairs:
            buffer = not isinstance(tensor, nn.Parameter)  # which a forward pass may write to
            tensor.data = average.to(tensor.device, tensor.dtype, copy=buffer)
            tensor.grad = None
        yield
    finally:
        for tensor, values, gradient in kept:
            tensor.data = values
            tensor.grad = gradient


@contextlib.contextmanager
def _refused_steps(model: nn.Module) -> Iterator[None]:
    own = {id(parameter) for parameter in model.parameters()}

    def refuse(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(
                f"{_INSIDE}, and cannot be trained: a step of {type(optimizer).__name__} would change that in place of "
                "the weights. Leave the block before optimizer.step()."
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def _eager(exchanged: bool) -> contextlib.AbstractContextManager[Any]:
    """A compiled model runs eagerly in the block: each time it has other dense layers, for which it would be compiled
    anew until dynamo's limit is reached, and run eagerly in silence from then on."""
    return torch.compiler.set_stance("force_eager") if exchanged else contextlib.nullcontext()


def _replaced(model: nn.Module, dense: Mapping[str, nn.Module]) -> bool:
    """Whether one of the stand-ins is gone."""
    try:
        Places(model, dense)
    except ValueError:
        return True
    return False


def _take_over_mode(dense: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Of ``model.eval()`` or ``model.train()`` in the block, as on the rest of the model."""
    for name, layer in layers.items():
        if isinstance(layer, LowRankLinear) and stack_count(layer) is not None:
            continue  # its stand-in is no part of the model, and its mode changes nothing
        layer.training = dense[name].training
