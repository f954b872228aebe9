"""Inputs and outputs of fused experts, each of which is multiplied with tokens of its own: what a hook does not see.

The experts' own forward pass reads ``self.down_proj``; here it finds a tensor that tells of each product it is in.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.covariance.moments import empty_moments
from hf_drt.forms import effective_weight, layout_of, place_of, stack_count
from hf_drt.linalg import full_precision

OnInput = Callable[[str, int, Tensor], None]
OnOutput = Callable[[str, int, Tensor], Tensor]

_TENSOR: Any = Tensor  # whose properties are descriptors
_TURNS = (_TENSOR.mT.__get__, _TENSOR.T.__get__, Tensor.t, torch.t, Tensor.transpose, torch.transpose)
_CASTS = (Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)


def stacks_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that are fused experts."""
    return {name: layer for name, layer in layers.items() if stack_count(layer) is not None}


class _Told(Tensor):
    """A weight of all experts, or of one, that tells of the products it is in."""

    layer_name: str
    expert: int | None
    tell: tuple[OnInput, OnOutput]

    @classmethod
    def of(cls, plain: Tensor, name: str, expert: int | None, tell: tuple[OnInput, OnOutput]) -> "_Told":
        told = plain.as_subclass(cls)
        told.layer_name, told.expert, told.tell = name, expert, tell
        return told

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        own = next((each for each in (*args, *kwargs.values()) if isinstance(each, _Told)), None)
        with torch._C.DisableTorchFunctionSubclass():
            args = tuple(each.as_subclass(Tensor) if isinstance(each, _Told) else each for each in args)
            kwargs = {k: v.as_subclass(Tensor) if isinstance(v, _Told) else v for k, v in kwargs.items()}
            if own is None:
                return func(*args, **kwargs)
            if func is F.linear or func in _PRODUCTS:
                return _product(own, func, args, kwargs)
            result = func(*args, **kwargs)
            if func is Tensor.__getitem__ and own.ndim == 3 and _is_one(args[1]):
                return cls.of(result, own.layer_name, int(args[1]), own.tell)
            return cls.of(result, own.layer_name, own.expert, own.tell) if func in (*_TURNS, *_CASTS) else result


def _is_one(index: Any) -> bool:
    return isinstance(index, Integral) or (isinstance(index, Tensor) and index.ndim == 0)


def _product(own: _Told, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The product, told of expert by expert; ``x`` is the first factor, but for ``__rmatmul__``."""
    x = args[1] if func is Tensor.__rmatmul__ else args[0]
    on_input, on_output = own.tell
    if own.expert is not None:
        on_input(own.layer_name, own.expert, x)
        return on_output(own.layer_name, own.expert, func(*args, **kwargs))
    for expert, part in enumerate(x):  # all of them at once, each with the same tokens (Llama 4)
        on_input(own.layer_name, expert, part)
    return torch.stack([on_output(own.layer_name, expert, part) for expert, part in enumerate(func(*args, **kwargs))])


@contextlib.contextmanager
def told(model: nn.Module, stacks: Mapping[str, nn.Module], on_input: OnInput, on_output: OnOutput) -> Iterator[None]:
    """Within, forward passes tell of the inputs ``(tokens, in)`` and outputs ``(tokens, out)`` of every expert.

    The experts run one after the other (``experts_implementation='eager'``). Of layers in low-rank form the weights are
    formed whole meanwhile.
    """
    grad = torch.is_grad_enabled()
    with contextlib.ExitStack() as undo, torch.no_grad():
        for name, layer in stacks.items():
            owner, leaf = place_of(model, name)
            # The instance's own attributes come before parameters and modules.
            weight = layout_of(layer).stored(effective_weight(layer)).detach().to(next(layer.parameters()).dtype)
            owner.__dict__[leaf] = _Told.of(weight, name, None, (on_input, on_output))
            undo.callback(owner.__dict__.pop, leaf)
            config = getattr(owner, "config", None)
            if (kernel := getattr(config, "_experts_implementation", None)) not in (None, "eager"):
                undo.callback(setattr, config, "_experts_implementation", kernel)
                config._experts_implementation = "eager"  # pyright: ignore[reportOptionalMemberAccess]
        with torch.set_grad_enabled(grad):
            yield


class ExpertMoments:
    """Sums over the tokens of every expert of ``v v^T (E, n, n)``, and how many tokens they were.

    Args:
        stacks: Layers of fused experts by name.
        outputs: Whether v has as many numbers as an expert's outputs, not as its inputs.
    """

    def __init__(self, stacks: Mapping[str, nn.Module], outputs: bool = False):
        self.sums = {name: empty_moments(layer, _device(layer), outputs) for name, layer in stacks.items()}
        self.counts = {name: torch.zeros(stack_count(layer) or 0) for name, layer in stacks.items()}

    @torch.no_grad()
    @full_precision()
    def add(self, name: str, expert: int, v: Tensor, weight: float = 1.0) -> None:
        """Count the rows of ``v (..., n)`` in, each ``weight`` times."""
        rows = v.detach().reshape(-1, v.shape[-1]).to(self.sums[name])
        with torch.autocast(rows.device.type, enabled=False):
            self.sums[name][expert].addmm_(rows.mT, rows, alpha=weight)
        self.counts[name][expert] += len(rows)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
