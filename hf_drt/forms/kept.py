"""A frozen matrix in fewer bits than its layer computes in: how it is kept, and how it is computed with.

In bfloat16 a weight takes 2 bytes. In int8 it takes one, with a scale in float32 for each row of W: ``W = scale q``.
The codes are those of torchao's int8 weight-only quantization, kept as plain tensors, so that whatever moves, copies,
saves or loads a model's tensors takes them for what they are; torchao is asked when a matrix is quantized, and not to
load one or to compute with it.
"""

from collections.abc import Mapping
from functools import reduce
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_drt.linalg import working_dtype

BASE, SCALE = "base", "base_scale"  # an adapter's frozen tensors


def check_quantizer(dtype: str | None) -> None:
    """Whether a frozen matrix can be brought into a type here.

    Raises:
        ValueError: It is int8, and torchao is not installed.
    """
    if dtype == "int8" and find_spec("torchao") is None:
        raise ValueError(
            "int8 bases are quantized by torchao, which is not installed. pip install 'hf-drt[int8]', or take bfloat16."
        )


def quantized(W: Tensor) -> tuple[Tensor, Tensor]:
    """``q (out, in)`` in int8 and ``scale (out, 1)`` in float32 of torchao's symmetric quantization by rows, for which
    ``scale q`` is W to half a scale, ``max |row| / 255``.

    Raises:
        ValueError: torchao is not installed.
    """
    check_quantizer("int8")
    from torchao.quantization import Int8Tensor, PerRow

    made = Int8Tensor.from_hp(W.detach().float(), granularity=PerRow())
    return made.qdata, made.scale.float()


def widened(kept: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A kept matrix in a dtype that it is computed with; of int8 ``scale q``, formed in the scale's dtype."""
    return kept.to(dtype) if scale is None else (kept.to(scale.dtype) * scale).to(dtype)


def in_one_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors by name in one dtype, without their graph: a base that is kept in fewer bits is widened, and
    its scale is left out."""
    scale = tensors.get(SCALE)
    return {
        name: widened(tensor.detach(), scale if name == BASE else None, dtype)
        for name, tensor in tensors.items()
        if name != SCALE
    }


def decomposed_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That in which a layer of these tensors is decomposed and merged: float32, or float64 where one of them is."""
    return working_dtype(reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())))


def linear(x: Tensor, kept: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``W x + b`` with a kept ``W (out, in)``, widened for the product alone, in the dtype of x or of autocast."""
    if scale is None and (torch.is_autocast_enabled(x.device.type) or x.dtype == kept.dtype):
        return F.linear(x, kept, bias)
    return Widened.apply(x, kept, scale, bias)


class Widened(torch.autograd.Function):
    """``x W^T + b`` with a W of fewer bits than x, in the dtype of x. The backward pass widens W again, so that
    autograd keeps W as it is stored and no copy of it. The gradient of x is that of the widened W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(W, scale)
        return F.linear(x, widened(W, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (W, scale) = gradients, ctx.saved_tensors
        dx = gradient @ widened(W, scale, gradient.dtype) if ctx.needs_input_grad[0] else None
        db = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return dx, None, None, db
