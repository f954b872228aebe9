"""StackWeight: the weight of fused experts in low-rank form, as the experts' own forward pass reads it.

Each implementation reads it in a way of its own: ``F.linear(x, W[e])`` or ``x @ W[e]`` in a loop over the experts
(eager), ``torch.bmm(W[ids], x)`` with the matrices of every token (batched_mm), ``grouped_mm(x, W.mT, offs)`` over
tokens sorted by expert (grouped_mm). All of these are answered by products with the factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_any

from hf_drt.forms.lazy import EffectiveWeight

_INDEX = Tensor.__getitem__
_SWAPS = {Tensor.mT.__get__, Tensor.T.__get__, Tensor.t, torch.t}
_TRANSPOSE = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes}
_MATMUL = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
}
# The last is transformers' own operator, for where torch's kernel cannot be used.
_GROUPED = {"grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback", "grouped_mm_fallback"}
_ALIGNMENT = 16  # bytes between rows, which kernels for grouped products ask for


class StackWeight(EffectiveWeight):
    """``P = C + s L R`` with ``L (..., a, r)``, ``R (..., r, b)``: one matrix, or one of each expert or token.

    Indexing and transposing give another one. A product with vectors or matrices is made of products with L and R (and
    C, if there is one); in any other computation P is formed. Gradients are those of autograd.

    Args:
        C: Frozen part in the layout of P; None for factors.
        L, R, s: The low-rank part.
    """

    @staticmethod
    def __new__(cls, C: Tensor | None, L: Tensor, R: Tensor, s: float) -> "StackWeight":
        shape = (*L.shape[:-1], R.shape[-1])
        trainable = torch.is_grad_enabled() and (L.requires_grad or R.requires_grad)
        return EffectiveWeight.__new__(cls, None, shape, L, trainable)

    def __init__(self, C: Tensor | None, L: Tensor, R: Tensor, s: float):
        trainable = torch.is_grad_enabled() and (L.requires_grad or R.requires_grad)
        self.parts = (C, L, R, s)
        super().__init__(self._product, (*L.shape[:-1], R.shape[-1]), L, trainable)

    def _product(self) -> Tensor:
        C, L, R, s = self.parts
        return s * (L @ R) if C is None else C + s * (L @ R)

    def _map(self, change: Any) -> "StackWeight":
        C, L, R, s = self.parts
        return StackWeight(None if C is None else change(C), change(L), change(R), s)

    def _swapped(self) -> "StackWeight":
        C, L, R, s = self.parts
        return StackWeight(None if C is None else C.mT, R.mT, L.mT, s)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = _answered(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs) if result is NotImplemented else result


def _answered(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result from the factors, or NotImplemented."""
    first = args[0] if args else None
    if isinstance(first, StackWeight):
        if func is _INDEX and first.ndim == 3 and _is_index(args[1]):
            return first._map(lambda part: part[args[1]])
        if func in _SWAPS and (first.ndim == 2 or func == Tensor.mT.__get__):
            return first._swapped()
        if func in _TRANSPOSE and len(args) == 3 and {d % first.ndim for d in args[1:]} == _last_two(first):
            return first._swapped()
    if tree_any(lambda value: isinstance(value, StackWeight), kwargs):
        return NotImplemented
    lazy = [isinstance(value, StackWeight) for value in args]
    if func is F.linear and lazy[:2] == [False, True] and first.ndim and args[1].ndim == 2:
        return _linear(*args, **kwargs)
    if func in _MATMUL and len(args) == 2 and not kwargs and sum(lazy) == 1:
        return _matmul(func, *args)
    if _name(func) in _GROUPED:
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if _name(func) in _GROUPED and lazy[:2] == [False, True] and sum(lazy) == 1 and set(kwargs) <= {"offs"}:
        return _grouped(func, first, args[1], args[2:], kwargs)
    return NotImplemented


def _is_index(index: Any) -> bool:
    """Of one expert, or of one expert each for many tokens."""
    return isinstance(index, int) or (isinstance(index, Tensor) and not index.is_floating_point() and index.ndim <= 1
                                      and index.dtype != torch.bool)  # fmt: skip


def _last_two(weight: Tensor) -> set[int]:
    return {weight.ndim - 2, weight.ndim - 1}


def _name(func: Any) -> str:
    return getattr(func, "__name__", None) or getattr(func, "_qualified_op_name", "")


def _linear(x: Tensor, weight: StackWeight, bias: Tensor | None = None) -> Tensor:
    C, L, R, s = weight.parts
    if C is None and s == 1:
        return F.linear(F.linear(x, R), L, bias)
    low = F.linear(F.linear(x, R), L)
    return _sum(None if C is None else F.linear(x, C, bias), low, s)


def _matmul(func: Any, left: Any, right: Any) -> Tensor:
    if func is Tensor.__rmatmul__:
        left, right = right, left
    weight = left if isinstance(left, StackWeight) else right
    C, L, R, s = weight.parts
    if weight is left:
        low = torch.matmul(L, torch.matmul(R, right))
        return _sum(None if C is None else torch.matmul(C, right), low, s)
    low = torch.matmul(torch.matmul(left, L), R)
    return _sum(None if C is None else torch.matmul(left, C), low, s)


def _grouped(func: Any, x: Tensor, weight: StackWeight, rest: tuple, kwargs: dict) -> Tensor:
    C, L, R, s = weight.parts
    L, R = _aligned(L, R)
    low = func(func(x, L, *rest, **kwargs), R, *rest, **kwargs)
    return _sum(None if C is None else func(x, C, *rest, **kwargs), low, s)


def _sum(whole: Tensor | None, low: Tensor, s: float) -> Tensor:
    if whole is None:
        return low if s == 1 else low * s
    return torch.add(whole, low, alpha=s)


def _aligned(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of zeros added, until a row of r numbers is one that kernels can read."""
    missing = -L.shape[-1] % (_ALIGNMENT // L.element_size())
    return (F.pad(L, (0, missing)), F.pad(R, (0, 0, 0, missing))) if missing else (L, R)
