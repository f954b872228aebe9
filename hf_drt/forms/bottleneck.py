"""What a block with factored layers keeps where the rest of its forward pass is repeated: the products with V.

Liu et al. 2025 (CoLA, arXiv 2502.10940, section 4.3) checkpoint a transformer of factored layers in this way: of each
layer ``U (V x)`` the r numbers ``V x`` per token are kept, and all between two of them (U's product, attention,
normalisation, activation functions) is computed again.

A layer says by :func:`narrow` which of its products is that with V. In a block that is called by
:func:`keep_bottlenecks` the product's result is put aside in the forward pass, and is what the repeated one is answered
by. The operator's own node in autograd's graph is made in both, so that gradients have the bits that they have without.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# The operators of torch that a product comes to; what else there is, as a copy of x in another layout, is repeated.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm"}
_here = threading.local()  # the backward pass may run in a thread of its own


class _Kept(TorchDispatchMode):
    """Puts products aside, or answers them by those that were, in the same order."""

    def __init__(self, results: list[Tensor], repeats: bool):
        super().__init__()
        self._results, self._repeats, self._at = results, repeats, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        if self._repeats:
            self._at += 1
            return self._results[self._at - 1].detach()  # autograd makes what it gets its own
        result = func(*args, **(kwargs or {}))
        self._results.append(result.detach())
        return result


@contextlib.contextmanager
def _within(mode: _Kept) -> Iterator[None]:
    outer = getattr(_here, "mode", None)
    _here.mode = mode
    try:
        yield
    finally:
        _here.mode = outer


def narrow(product: Callable[..., Tensor], *args: Any) -> Tensor:
    """``product(*args)``, the one of a factored layer that gives r numbers per token."""
    if torch.compiler.is_compiling() or (mode := getattr(_here, "mode", None)) is None:
        return product(*args)
    with mode:
        return product(*args)


class _Contexts:
    """Of one call of a block: the context of its forward pass, and that of each repetition."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []

    def __call__(self) -> tuple[Any, Any]:
        return _within(_Kept(self._results, repeats=False)), self

    def __enter__(self) -> None:
        self._repetition = _within(_Kept(self._results, repeats=True))
        self._repetition.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._repetition.__exit__(*error)


def keep_bottlenecks(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``function(*args)``, of which the backward pass keeps ``args`` and the results of :func:`narrow`, and repeats all
    else.

    Args:
        options: Of ``torch.utils.checkpoint.checkpoint``.
    """
    return checkpoint(function, *args, **options, use_reentrant=False, context_fn=_Contexts())
