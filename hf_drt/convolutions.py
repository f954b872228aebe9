"""Which convolutions are trained in changing rank: those inside repeated blocks; and why each other one is not."""

import re
from collections.abc import Iterator

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


def conv_inside(model: nn.Module, blocks: dict[str, nn.Module]) -> set[int]:
    """Modules inside blocks, by id, as far as convolutions go.

    These are the given blocks, and the innermost children of a ``ModuleList`` or ``Sequential`` that hold two or more
    layers, one of them a convolution; where neither exists, the children of a ``ModuleList`` that hold one. A block
    that is not in a list itself, as a stem built from a block's class, is none.
    """
    modules = dict(model.named_modules())
    roots = {name for name in blocks if _is_listed(name, modules)} | set(_innermost(_children(modules, 2)))
    roots = roots or set(_innermost(_children(modules, 1)))
    return {id(module) for name in roots for module in modules[name].modules()}


def _children(modules: dict[str, nn.Module], count: int) -> Iterator[str]:
    holders = (nn.ModuleList, nn.Sequential) if count > 1 else nn.ModuleList
    for name, holder in modules.items():
        for key, child in holder.named_children() if isinstance(holder, holders) else ():
            inside = list(child.modules())
            convolutions = sum(map(is_convolution, inside))
            layers = convolutions + sum(isinstance(module, nn.Linear) for module in inside)
            if convolutions and layers >= count and not is_convolution(child):
                yield f"{name}.{key}" if name else key


def _innermost(names: Iterator[str]) -> list[str]:
    found = set(names)
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _is_listed(name: str, modules: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    holders = (modules.get(".".join(parts[:depth])) for depth in range(len(parts)))
    return any(isinstance(holder, (nn.ModuleList, nn.Sequential)) for holder in holders)
