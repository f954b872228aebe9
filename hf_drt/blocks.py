"""Blocks: the parts of a model whose linear layers and convolutions are trained in changing rank.

transformers' classes are recognised by qualified name, so that nothing here imports it.
"""

from collections.abc import Iterator

from torch import nn

from hf_drt.convolutions import has_conv_form, is_convolution
from hf_drt.forms import ExpertStack, LowRankLinear, is_transposed

_CHECKPOINTING_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"


def block_roots(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformer blocks by name; empty if none is recognised."""
    modules = {name: m for name, m in model.named_modules() if name}
    named = set().union(*(getattr(m, "_no_split_modules", None) or () for m in model.modules()))
    candidates = (
        {name for name, m in modules.items() if _is_checkpointing_layer(m)},
        {name for name, m in modules.items() if type(m).__name__ in named},
        set(_list_blocks(model)),
    )
    found = next(filter(None, candidates), set())
    outermost = (name for name in modules if name in found)
    return {n: modules[n] for n in outermost if not any(n.startswith(f"{other}.") for other in found)}


def _is_checkpointing_layer(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" == _CHECKPOINTING_LAYER for cls in type(module).__mro__)


def _list_blocks(model: nn.Module) -> Iterator[str]:
    """Children of a ModuleList that hold two or more linear layers."""
    for name, holder in model.named_modules():
        for child_name, child in holder.named_children() if isinstance(holder, nn.ModuleList) else ():
            if sum(map(is_linear, child.modules())) >= 2:
                yield f"{name}.{child_name}" if name else child_name


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


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in one of the forms, or may become one: nn.Linear, Conv1D, or ours."""
    ours = isinstance(module, (LowRankLinear, ExpertStack)) and not has_conv_form(module)
    return ours or isinstance(module, nn.Linear) or is_transposed(module)
