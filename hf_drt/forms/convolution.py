"""The low-rank forms of ``nn.Conv1d`` and ``nn.Conv2d``: short chains of convolutions in place of one.

Stride, dilation and padding are those of the step that has the kernel: a 1x1 convolution without bias commutes with
padding of any mode.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms.modules import AdapterLinear, FactoredLinear, LowRankLinear

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d}
_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "_reversed_padding_repeated_twice",
)  # fmt: skip


class LowRankConv(LowRankLinear):
    """What both low-rank forms of a convolution share: the attributes of the dense one, and the low-rank chain."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, dense: nn.Module, *args: Any):
        super().__init__(dense, *args)
        for name in _GEOMETRY:
            setattr(self, name, getattr(dense, name))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """A convolution with this layer's stride, padding and dilation."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _CONVOLVE[len(self.kernel_size)](x, weight, bias, self.stride, padding, self.dilation, groups)

    def chain(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The low-rank product applied to ``x``, without an adapter's scaling."""
        return self.product.convolution(x, self.product_tensors(), self, bias)

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """A 1 x 1 convolution with ``matrix (out, in)``."""
        axes = len(self.kernel_size)
        return _CONVOLVE[axes](x, matrix.view(*matrix.shape, *(1,) * axes), bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode!r}, {self.form}"
        )


class FactoredConv(LowRankConv, FactoredLinear):
    """``y = chain(x) + b``: W never exists."""

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x, self.bias)


class AdapterConv(LowRankConv, AdapterLinear):
    """``y = base * x + b + (alpha / r) chain(x)``; ``base`` is frozen and stored as the dense kernel."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x, self.base, self.bias)
        if not self.training:  # rounded as PEFT rounds: an adapter that was trained there gives the same bits here
            return y + self.chain(x) * self.form.scaling
        return torch.add(y, self.chain(x), alpha=self.form.scaling)  # without a third pass over memory of their size
