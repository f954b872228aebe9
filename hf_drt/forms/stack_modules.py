"""The low-rank forms of fused experts. They stand in the experts module where the parameter was, and under its name.

The experts' own forward pass, of whatever model and implementation, reads ``self.down_proj`` and finds one of these in
place of the tensor; :class:`hf_drt.forms.stack_weight.StackWeight` answers what it does with it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_drt.forms.modules import AdapterLinear, FactoredLinear
from hf_drt.forms.stack_weight import StackWeight


class LowRankStack:
    """What both forms share: one low-rank ``W_e (out, in)`` of the same rank for each of E experts.

    It behaves as the parameter does where a forward pass reads that: index, shape, dtype, device, transposition, and as
    an argument of torch's functions.
    """

    @property
    def weight(self) -> Tensor:
        """All W_e in the layout of the dense parameter, formed only where a computation needs them whole."""
        if torch.compiler.is_compiling():
            return self._formed_weight()
        L, R, scale = self.pair()
        sides = (R.mT, L.mT) if self.layout.transposed else (L, R)
        weight = StackWeight(self._parameters.get("base"), *sides, scale)
        weight._is_hf_initialized = self.__dict__.get("_is_hf_initialized", False)
        return weight

    def forward(self, *args: Any) -> Tensor:
        raise RuntimeError("fused experts are called through the module that holds them.")

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.weight, name)

    # Those of nn.Module would convert the layer itself; model.to() and the like go another way.
    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.weight.to(*args, **kwargs)

    def float(self) -> Tensor:
        return self.weight.float()

    def half(self) -> Tensor:
        return self.weight.half()

    def bfloat16(self) -> Tensor:
        return self.weight.bfloat16()

    def double(self) -> Tensor:
        return self.weight.double()

    def type(self, dtype: Any) -> Tensor:
        return self.weight.type(dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(lambda v: v.weight if isinstance(v, LowRankStack) else v, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense_key(self, name: str) -> str:
        return name

    def extra_repr(self) -> str:
        return f"experts={self.layout.count}, {super().extra_repr()}"


class FactoredStack(LowRankStack, FactoredLinear):
    """``W_e = U_e V_e`` with ``U (E, out, r)`` and ``V (E, r, in)``."""


class AdapterStack(LowRankStack, AdapterLinear):
    """``W_e = base_e + (alpha / r) lora_B_e lora_A_e`` with ``lora_A (E, r, in)``, ``lora_B (E, out, r)`` and a frozen
    ``base`` in the layout of the dense parameter."""
