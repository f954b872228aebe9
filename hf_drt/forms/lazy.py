"""EffectiveWeight: the ``weight`` of a low-rank layer, formed only if somebody computes with it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METADATA = {
    Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.is_meta.__get__,
    Tensor.is_cuda.__get__, Tensor.layout.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.element_size, torch.is_floating_point, torch.is_complex,
}  # fmt: skip


class EffectiveWeight(Tensor):
    """A stand-in for ``W``, with its shape, dtype and device, that becomes ``layer.matrix()`` in any computation.

    Models read ``layer.weight.dtype`` in their forward pass (the T5 family does, three times per layer); forming the
    m x n product each time would cost more than the layer itself. Gradients flow to the layer's own parameters.
    """

    @staticmethod
    def __new__(cls, form_weight: Any, shape: tuple[int, int], like: Tensor) -> "EffectiveWeight":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, form_weight: Any, shape: tuple[int, int], like: Tensor):
        self._form_weight = form_weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_formed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(_formed, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:
        return f"EffectiveWeight({_formed(self)!r})"


def _formed(value: Any) -> Any:
    if isinstance(value, EffectiveWeight):
        with torch._C.DisableTorchFunctionSubclass():
            return value._form_weight()
    return value
