"""EffectiveWeight: the ``weight`` of a low-rank layer, formed only if somebody computes with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

TENSOR: Any = Tensor  # its properties are descriptors, which its type annotations do not tell
METADATA = {
    TENSOR.dtype.__get__, TENSOR.device.__get__, TENSOR.shape.__get__, TENSOR.ndim.__get__, TENSOR.is_meta.__get__,
    TENSOR.is_cuda.__get__, TENSOR.layout.__get__, TENSOR.requires_grad.__get__, TENSOR.grad.__get__, Tensor.size,
    Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size,
    torch.is_floating_point, torch.is_complex,
}  # fmt: skip


class EffectiveWeight(Tensor):
    """A stand-in for ``W``, with its shape, dtype and device, that becomes the real one in any computation.

    Models read ``layer.weight.dtype`` in their forward pass (the T5 family does, three times per layer); forming the
    m x n product each time would cost more than the layer itself. Gradients flow to the layer's own parameters. W is
    no parameter of the layer: writing to it, which would change nothing, is an error.

    Args:
        form: Gives the real W, differentiable.
        shape: Its shape.
        like: A tensor of its dtype and device.
        trainable: Whether gradients shall reach the layer.
    """

    _is_hf_initialized: bool  # transformers' mark of weights that have been loaded

    @staticmethod
    def __new__(
        cls, form: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, trainable: bool = False
    ) -> "EffectiveWeight":
        flags = {"dtype": like.dtype, "device": like.device, "requires_grad": trainable}
        return torch.Tensor._make_wrapper_subclass(cls, shape, **flags)

    def __init__(self, form: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, trainable: bool = False):
        self._form, self._shape, self._like = form, shape, like
        if trainable:
            # Where autograd is reached without __torch_function__, as through autograd.Function.apply, the gradient
            # arrives here and is handed on to the factors.
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(self._hand_on)

    def _hand_on(self, gradient: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.backward(self._form(), gradient)

    def _detached(self) -> "EffectiveWeight":
        return EffectiveWeight(lambda: self._form().detach(), self._shape, self._like)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == TENSOR.data.__get__:  # a method wrapper, made anew at each access
            return args[0]._detached()
        refuse_writing(cls, func, args, kwargs)
        return _with_real_weights(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _with_real_weights(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"EffectiveWeight({_formed(self)!r})"


def refuse_writing(cls: type, func: Any, args: tuple, kwargs: dict) -> None:
    """Refuse a function that would write to a weight of this class.

    Raises:
        RuntimeError: It would.
    """
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
    is_ours = isinstance(next(iter((*args, *kwargs.values())), None), cls)
    written = tree_any(lambda value: isinstance(value, cls), kwargs.get("out"))
    if (in_place and is_ours) or written:
        raise RuntimeError(
            f"{name} would write to the weight of a low-rank layer, which is formed anew at every use. Write to its "
            "parameters (U and V, or base, lora_A and lora_B), or convert the layer to Dense() first."
        )


def _with_real_weights(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return func(*tree_map(_formed, args), **{name: tree_map(_formed, value) for name, value in kwargs.items()})


def _formed(value: Any) -> Any:
    if isinstance(value, EffectiveWeight):
        with torch._C.DisableTorchFunctionSubclass():
            return value._form()
    return value
