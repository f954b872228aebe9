"""A frozen W in fewer bits than the layer computes in: 2 bytes a weight, and no more than that during a step."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.forms.kept import linear
from hf_drt.forms.lazy import EffectiveWeight
from hf_drt.forms.modules import FormedLinear
from hf_drt.forms.specs import Dense


class FrozenLinear(FormedLinear):
    """``y = W x + b`` with a frozen W in the dense layout and in ``form.dtype``, widened for each product.

    Saved, it is a dense layer, with the parameter ``weight``: it loads where a dense one does. The attribute ``weight``
    has the dtype in which the layer computes, since models cast to that of the weights (the T5 family does).

    Attributes:
        dtype: Of W when it is trained, and of the attribute ``weight``.
        by_user: Whether its user had frozen it before its form did.
    """

    form: Dense

    def __init__(
        self,
        dense: nn.Module,
        form: Dense,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        by_user: bool = False,
    ):
        super().__init__(dense, form, {"weight": weight}, bias)
        self.dtype, self.by_user = dtype, by_user

    @property
    def kept(self) -> nn.Parameter:
        """W as it is kept, in the dense layout."""
        kept = self._parameters.get("weight")
        if kept is None:  # as while nn.Module registers it, which asks for the attribute
            raise AttributeError("weight")
        return kept

    @property
    def weight(self) -> Tensor:
        """W in the dense layout and in :attr:`dtype`; widened when it is computed with."""
        kept = self.kept
        if torch.compiler.is_compiling() or kept.dtype == self.dtype:
            return kept.to(self.dtype)
        like = torch.empty(0, dtype=self.dtype, device=kept.device)
        return EffectiveWeight(lambda: kept.detach().to(self.dtype), tuple(kept.shape), like)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenLinear":
        """Under ``module.to(dtype)``, the dtype of W when it is trained follows."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.kept.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.layout.matrix(self.kept), None, self.bias)
