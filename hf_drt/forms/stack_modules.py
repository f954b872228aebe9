"""The low-rank forms of fused experts. They stand in the experts module where the parameter was, and under its name.

The experts' own forward pass, of whatever model and implementation, reads ``self.down_proj`` and finds one of these in
place of the tensor; :class:`hf_drt.forms.stack_weight.StackWeight` answers what it does with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_drt.forms.modules import AdapterLinear, FactoredLinear, LowRankLinear
from hf_drt.forms.stack_weight import StackWeight, attribute_names, refusal

_ATTRIBUTES = attribute_names()


def _of_weight(name: str) -> Callable[..., Any]:
    """The tensor's method of this name."""

    def method(self: "LowRankStack", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.weight, name)(*args, **kwargs)

    return method


def _weight_of(value: Any) -> Any:
    return value.weight if isinstance(value, LowRankStack) else value


class LowRankStack(LowRankLinear):
    """What both forms share: one low-rank ``W_e (out, in)`` of the same rank for each of E experts.

    It behaves as the parameter does where a forward pass reads that: :data:`hf_drt.forms.stack_weight.SURFACE` lists
    how, as attribute, as method and as argument of torch's functions.
    """

    @property
    def weight(self) -> Tensor:
        """All W_e in the layout of the dense parameter, formed only where a computation needs them whole."""
        if torch.compiler.is_compiling():
            return self._formed_weight()
        L, R, scale = self.pair()
        sides = (R.mT, L.mT) if self.layout.transposed else (L, R)
        weight = StackWeight(self.base if self.form.adapts else None, *sides, scale)
        weight._is_hf_initialized = self.__dict__.get("_is_hf_initialized", False)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("fused experts are called through the module that holds them.")

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _ATTRIBUTES:
                return getattr(self.weight, name)
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            raise AttributeError(refusal(f"Tensor.{name}")) from None

    # Those of nn.Module would convert the layer itself; model.to() and the like go another way.
    to: Any = _of_weight("to")
    float: Any = _of_weight("float")
    half: Any = _of_weight("half")
    bfloat16: Any = _of_weight("bfloat16")
    double: Any = _of_weight("double")
    type: Any = _of_weight("type")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args = tree_map(_weight_of, args)
        return func(*args, **{name: tree_map(_weight_of, value) for name, value in (kwargs or {}).items()})

    def dense_key(self, name: str) -> str:
        return name

    def extra_repr(self) -> str:
        return f"experts={self.layout.count}, {super().extra_repr()}"


class FactoredStack(LowRankStack, FactoredLinear):
    """``W_e = U_e V_e`` with ``U (E, out, r)`` and ``V (E, r, in)``."""


class AdapterStack(LowRankStack, AdapterLinear):
    """``W_e = base_e + (alpha / r) lora_B_e lora_A_e`` with ``lora_A (E, r, in)``, ``lora_B (E, out, r)`` and a frozen
    ``base`` in the layout of the dense parameter."""
