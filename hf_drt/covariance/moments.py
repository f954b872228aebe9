"""The sum of ``x x^T`` over the inputs that the weight of a layer is multiplied with."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms import layout_of, weight_shape
from hf_drt.linalg import full_precision, working_dtype

PATCHES = 1 << 24
"""Numbers of unfolded patches of a convolution that are held at a time: 64 MiB."""


def empty_moments(layer: nn.Module, device: torch.device, outputs: bool = False) -> Tensor:
    """Zeros ``(groups, n, n)``, with n the inputs of one group of the layer: 1 group but for grouped convolutions, E of
    fused experts. With ``outputs`` n is all of its outputs, and there are no groups but experts.

    Raises:
        ValueError: The layer is a transposed convolution.
    """
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        raise ValueError(
            f"inputs of a {type(layer).__name__} are not gathered: only of linear layers and convolutions, "
            "and in calibration of fused experts."
        )
    count = layout_of(layer).count
    if outputs:
        groups, n = count or 1, weight_shape(layer).d_out
    else:
        groups, n = count or _groups(layer), _inputs(layer)
    dtype = working_dtype(next(layer.parameters()).dtype)
    return torch.zeros(groups, n, n, dtype=dtype, device=device)


@torch.no_grad()
@full_precision()
def add_moments(total: Tensor, layer: nn.Module, x: Tensor) -> int:
    """Add ``sum x x^T`` to ``total`` in place, in float32 or better, whatever autocast has the layer compute in.

    Args:
        total: ``(groups, n, n)``, as :func:`empty_moments`.
        layer: A linear layer ``x (..., in)``, or a convolution ``x ([samples,] channels, *size)``, in any form.

    Returns:
        How many inputs it was: positions of all samples, of a convolution those of its output.
    """
    return add_cross_moments(total, layer, x, x)


@torch.no_grad()
@full_precision()
def add_cross_moments(total: Tensor, layer: nn.Module, x: Tensor, other: Tensor) -> int:
    """Add ``sum x y^T`` to ``total`` in place, with y the inputs ``other``, of the shape of x; else as
    :func:`add_moments`."""
    count, both = 0, [x.detach()] if other is x else [x.detach(), other.detach()]
    with torch.autocast(total.device.type, enabled=False):
        for columns in zip(*(_columns(layer, each) for each in both), strict=True):
            X, Y = (part.to(total) for part in (columns[0], columns[-1]))
            total.baddbmm_(X, Y.mT)
            count += X.shape[-1]
    return count


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _inputs(layer: nn.Module) -> int:
    """Of a grouped convolution those of one group."""
    return weight_shape(layer).d_in // _groups(layer)


def _columns(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs as columns ``(groups, n, count)``, of a convolution a few samples at a time."""
    if not (kernel := layout_of(layer).kernel):
        yield x.reshape(-1, x.shape[-1]).mT[None]
        return
    x = x if x.ndim == len(kernel) + 2 else x[None]
    conv: Any = layer
    outputs = math.prod(size // stride for size, stride in zip(x.shape[2:], conv.stride, strict=True)) or 1
    samples = max(PATCHES // (x.shape[1] * math.prod(kernel) * outputs), 1)
    for some in x.split(samples):
        patches = _unfolded(conv, some.float() if some.dtype != torch.float64 else some)
        yield patches.unflatten(1, (_groups(layer), -1)).permute(1, 2, 0, 3).flatten(2)


def _unfolded(conv: Any, x: Tensor) -> Tensor:
    """Patches ``(samples, channels * kernel, positions)`` in the order in which the kernel as a matrix has its columns,
    of one and of two dimensions."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation=dilation, stride=stride)
