"""StackWeight: the weight of fused experts in low-rank form, as the experts' own forward pass reads it.

Each implementation reads it in a way of its own: ``F.linear(x, W[e])`` or ``x @ W[e]`` in a loop over the experts
(eager), ``torch.bmm(W[ids], x)`` with the matrices of every token (batched_mm), ``grouped_mm(x, W.mT, offs)`` over
tokens sorted by expert (grouped_mm). All of these are answered by products with the factors. What else there is,
:data:`SURFACE` lists; anything that is not in it is an error, since forming all experts' weights for it would take more
memory and time than the dense model does.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_any

from hf_drt.forms.bottleneck import narrow
from hf_drt.forms.lazy import METADATA, TENSOR, refuse_writing

ALLOWED = (
    "shape, dtype, device and the like; an index of one expert, or of one for each of many tokens; transposition of "
    "the last two dimensions; a cast to another floating-point type or device, and detach; the products F.linear, "
    "matmul (@), bmm, mm and grouped_mm with a plain tensor"
)
_ALIGNMENT = 16  # bytes between rows, which kernels for grouped products ask for

Answer = Callable[[Any, tuple, dict[str, Any]], Any]


class StackWeight(Tensor):
    """``P = C + s L R`` with ``L (..., a, r)``, ``R (..., r, b)``: one matrix, or one of each expert or token.

    Indexing and transposing give another one. A product with vectors or matrices is made of products with L and R (and
    C, if there is one). P is never formed. Gradients are those of autograd.

    Args:
        C: Frozen part in the layout of P; None for factors.
        L, R, s: The low-rank part.
    """

    parts: tuple[Tensor | None, Tensor, Tensor, float]
    _is_hf_initialized: bool  # transformers' mark of weights that have been loaded

    @staticmethod
    def __new__(cls, C: Tensor | None, L: Tensor, R: Tensor, s: float) -> "StackWeight":
        trainable = torch.is_grad_enabled() and (L.requires_grad or R.requires_grad)
        flags = {"dtype": L.dtype, "device": L.device, "requires_grad": trainable}
        return torch.Tensor._make_wrapper_subclass(cls, (*L.shape[:-1], R.shape[-1]), **flags)

    def __init__(self, C: Tensor | None, L: Tensor, R: Tensor, s: float):
        self.parts = (C, L, R, s)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "StackWeight":
        """With every part changed in the same way."""
        C, L, R, s = self.parts
        return StackWeight(None if C is None else change(C), change(L), change(R), s)

    def swapped(self) -> "StackWeight":
        """Transposed, in the last two dimensions."""
        C, L, R, s = self.parts
        return StackWeight(None if C is None else C.mT, R.mT, L.mT, s)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = answer_of(func)(func, args, kwargs)
        if result is not NotImplemented:
            return result
        refuse_writing(StackWeight, func, args, kwargs)
        raise NotImplementedError(refusal(resolve_name(func) or _name(func), args, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What arrives here has passed by the functions above, as ``autograd.Function.apply`` does."""
        raise NotImplementedError(refusal(_name(func), args, kwargs or {}))

    def __repr__(self, **kwargs: Any) -> str:
        return f"StackWeight(shape={tuple(self.shape)}, rank={self.parts[1].shape[-1]}, dtype={self.dtype})"


def refusal(name: str, args: tuple = (), kwargs: dict[str, Any] | None = None) -> str:
    """Why a use of the weight is refused, and what to do."""
    given = ", ".join([*map(_told, args), *(f"{key}={_told(value)}" for key, value in (kwargs or {}).items())])
    return (
        f"{name}({given}) is not answered by the weights of fused experts in low-rank form. Allowed are {ALLOWED}. "
        f"Form the weights first (hf_drt.effective_weight(layer)), have the experts run by one of "
        "experts_implementation='eager', 'batched_mm' or 'grouped_mm', or keep them dense: exclude=['experts']."
    )


def _told(value: Any) -> str:
    if isinstance(value, Tensor) and not isinstance(value, StackWeight):
        return f"tensor of shape {tuple(value.shape)}"
    return repr(value)


# ---- the answers: each NotImplemented where it has none to these arguments


def _metadata(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _indexed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    weight, index = args
    if not isinstance(weight, StackWeight) or weight.ndim != 3 or not _is_index(index):
        return NotImplemented
    return weight.mapped(lambda part: part[index])


def _is_index(index: Any) -> bool:
    """Of one expert, or of one expert each for many tokens."""
    if isinstance(index, Tensor):
        return index.ndim <= 1 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, Integral) and not isinstance(index, bool)


def _transposed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Of what swaps the last two dimensions of a stack, or of a matrix."""
    return args[0].swapped()


def _matrix_transposed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0].swapped() if args[0].ndim == 2 else NotImplemented


def _dimensions_swapped(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    weight, *dims = (*args, *kwargs.values())
    last = {weight.ndim - 2, weight.ndim - 1}
    return weight.swapped() if len(dims) == 2 and {d % weight.ndim for d in dims} == last else NotImplemented


def _cast(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    weight, *rest = args
    if not isinstance(weight, StackWeight) or any(isinstance(value, StackWeight) for value in rest):
        return NotImplemented
    changed = weight.mapped(lambda part: func(part, *rest, **kwargs))
    return changed if changed.parts[1].is_floating_point() else NotImplemented


def _detached(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0].mapped(Tensor.detach)


def _linear(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    x, weight, *rest = args
    bias = rest[0] if rest else kwargs.get("bias")
    if _lazy(x, bias) or set(kwargs) - {"bias"} or not isinstance(weight, StackWeight) or weight.ndim != 2:
        return NotImplemented
    C, L, R, s = weight.parts
    if C is None and s == 1:
        return F.linear(narrow(F.linear, x, R), L, bias)
    low = F.linear(narrow(F.linear, x, R), L)
    if C is None:
        return _sum(bias, low, s)
    return _sum(F.linear(x, C, bias), low, s)


def _matmul(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or _lazy(args[0]) == _lazy(args[1]):
        return NotImplemented
    left, right = args[::-1] if func is Tensor.__rmatmul__ else args
    weight = left if isinstance(left, StackWeight) else right
    C, L, R, s = weight.parts
    if weight is left:
        low = torch.matmul(L, narrow(torch.matmul, R, right))
        return _sum(None if C is None else torch.matmul(C, right), low, s)
    low = torch.matmul(narrow(torch.matmul, left, L), R)
    return _sum(None if C is None else torch.matmul(left, C), low, s)


def _grouped(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    x, weight, *rest = args
    if _lazy(x, *rest, *kwargs.values()) or not _lazy(weight) or set(kwargs) - {"offs"}:
        return NotImplemented
    C, L, R, s = weight.parts
    L, R = _aligned(L, R)
    low = func(narrow(partial(func, **kwargs), x, L, *rest), R, *rest, **kwargs)
    return _sum(None if C is None else func(x, C, *rest, **kwargs), low, s)


def _none(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return NotImplemented


def _lazy(*values: Any) -> bool:
    return tree_any(lambda value: isinstance(value, StackWeight), values)


def _sum(whole: Tensor | None, low: Tensor, s: float) -> Tensor:
    if whole is None:
        return low if s == 1 else low * s
    return torch.add(whole, low, alpha=s)


def _aligned(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of zeros added, until a row of r numbers is one that kernels can read."""
    missing = -L.shape[-1] % (_ALIGNMENT // L.element_size())
    return (F.pad(L, (0, missing)), F.pad(R, (0, 0, 0, missing))) if missing else (L, R)


SURFACE: dict[Any, Answer] = {
    **dict.fromkeys(METADATA, _metadata),
    Tensor.__getitem__: _indexed,
    TENSOR.mT.__get__: _transposed,
    **dict.fromkeys((TENSOR.T.__get__, Tensor.t, torch.t), _matrix_transposed),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes), _dimensions_swapped),
    **dict.fromkeys(
        (Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type), _cast
    ),
    **dict.fromkeys((Tensor.detach, TENSOR.data.__get__), _detached),
    F.linear: _linear,
    **dict.fromkeys(
        (
            torch.matmul, Tensor.matmul, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.mm,
            Tensor.mm,
        ),
        _matmul,
    ),
}  # fmt: skip
"""Everything that the weight answers, by function, and how; the grouped products beside them, by name."""
# The last is transformers' own operator, for where torch's kernel cannot be used.
GROUPED = {"grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback", "grouped_mm_fallback"}


def answer_of(func: Any) -> Answer:
    """What answers a call of this function."""
    return _grouped if _name(func) in GROUPED else SURFACE.get(func, _none)


def _name(func: Any) -> str:
    return getattr(func, "__name__", None) or getattr(func, "_qualified_op_name", None) or str(func)


def attribute_names() -> frozenset[str]:
    """Names of the attributes and methods of a tensor that the weight has."""
    members = ((name, getattr(Tensor, name)) for name in dir(Tensor) if not name.startswith("_"))
    return frozenset(n for n, member in members if member in SURFACE or getattr(member, "__get__", None) in SURFACE)
