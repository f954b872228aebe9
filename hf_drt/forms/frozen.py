"""A frozen W in fewer bits than the layer computes in: 2 bytes a weight, and no more than that during a step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms.modules import FormedLinear
from hf_drt.forms.specs import Dense


class FrozenLinear(FormedLinear):
    """``y = W x + b`` with a frozen ``weight`` in the dense layout and in ``form.dtype``, widened for each product.

    Saved, it is a dense layer: it loads where a dense one does.

    Attributes:
        dtype: Of W when it is trained.
        by_user: Whether its user had frozen it before its form did.
    """

    form: Dense
    weight: nn.Parameter

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

    def forward(self, x: Tensor) -> Tensor:
        W = self.layout.matrix(self.weight)
        if torch.is_autocast_enabled(x.device.type) or x.dtype == W.dtype:
            return F.linear(x, W, self.bias)
        return Widened.apply(x, W, self.bias)


class Widened(torch.autograd.Function):
    """``x W^T + b`` with a W of fewer bits than x, in the dtype of x. The backward pass widens W again, so that
    autograd keeps W as it is stored and no copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return F.linear(x, W.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (W,) = gradients, ctx.saved_tensors
        dx = gradient @ W.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        db = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db
