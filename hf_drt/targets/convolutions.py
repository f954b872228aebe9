"""Which convolutions cannot change rank, and why."""

import re

from torch import nn

from hf_drt.forms import LowRankLinear, layout_of

_SHORTCUT = re.compile(r"short_?cut|downsample|skip", re.IGNORECASE)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind, or one of this package's forms of one."""
    return isinstance(module, nn.modules.conv._ConvNd) or has_conv_form(module)


def has_conv_form(module: nn.Module) -> bool:
    """Whether a module is a convolution in low-rank form."""
    return isinstance(module, LowRankLinear) and bool(layout_of(module).kernel)


def conv_unfit(name: str, module: nn.Module) -> str | None:
    """Why the geometry of a convolution, or its place in a block, keeps it dense; None where nothing does."""
    if has_conv_form(module):
        return None
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "convolution over three axes"
    if module.groups != 1:
        return "depthwise convolution" if module.groups == module.in_channels else "grouped convolution"
    if all(size == 1 for size in module.kernel_size) and any(map(_SHORTCUT.search, name.split("."))):
        return "1x1 shortcut"
    return None
