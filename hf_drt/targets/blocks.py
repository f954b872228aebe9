"""Blocks: the parts of a model whose linear layers and convolutions are trained in changing rank.

transformers' classes are recognised by qualified name, so that nothing here imports it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from hf_drt.forms import ExpertStack, FormedLinear, is_transposed
from hf_drt.targets.convolutions import has_conv_form, is_convolution

_CHECKPOINTING_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
_TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_LISTS = (nn.ModuleList, nn.Sequential)
_CONTAINERS = (*_LISTS, nn.ModuleDict)
_SHOWN = 12  # names and classes that an error lists


def block_roots(model: nn.Module, blocks: list[str] | None = None) -> dict[str, nn.Module]:
    """The outermost blocks by name; empty if none is recognised.

    They are those that ``blocks`` names (:func:`named_blocks`). Where it is None they are the model's
    ``GradientCheckpointingLayer`` objects, else the classes in ``_no_split_modules``, else what repeats in its lists
    (:func:`_units`); and the twins of all these (:func:`_twins`).
    """
    modules = dict(model.named_modules())
    if blocks is not None:
        return _outermost(named_blocks(model, blocks), modules)
    named = set().union(*(getattr(m, "_no_split_modules", None) or () for m in model.modules()))
    candidates = (
        {name for name, m in modules.items() if name and is_checkpointing_layer(m)},
        {name for name, m in modules.items() if name and type(m).__name__ in named},
        _units(modules),
    )
    roots = _outermost(next(filter(None, candidates), set()), modules)
    return _outermost({*roots, *_twins(roots, modules)}, modules)


def named_blocks(model: nn.Module, entries: list[str]) -> set[str]:
    """Names of the modules that ``entries`` name, as far as they hold layers; the model's own name is ''.

    An entry is the name of a class, or a regular expression that is searched in the names of modules.

    Raises:
        ValueError: An entry names no module that holds a linear layer or a convolution.
    """
    holders = {name: m for name, m in model.named_modules() if any(map(_is_layer, m.modules()))}
    found = {
        entry: {name for name, m in holders.items() if type(m).__name__ == entry or re.search(entry, name)}
        for entry in entries
    }
    if idle := [entry for entry, names in found.items() if not names]:
        inner = {name: m for name, m in holders.items() if name and not _is_layer(m)} or holders
        raise ValueError(
            f"blocks: {idle[0]!r} is neither the class of a module of {type(model).__name__} that holds a linear layer "
            "or a convolution, nor a regular expression that is found in the name of one. Classes are "
            f"{_some({type(m).__name__: None for m in inner.values()})}; names are {_some(inner)}."
        )
    return set().union(*found.values())


def conv_inside(model: nn.Module, blocks: dict[str, nn.Module]) -> set[int]:
    """Modules inside blocks, by id, as far as convolutions go.

    These are the given blocks, and the innermost children of a ``ModuleList`` or ``Sequential`` that hold two or more
    layers, one of them a convolution (a child gives way to those in it where they hold half of its layers); where
    neither exists, the children of a ``ModuleList`` that hold one; and where there are no lists at all, as in a tree,
    the innermost modules of a class that repeats and holds two or more. A block that is not in a list itself, as a stem
    built from a block's class, is none.
    """
    modules = dict(model.named_modules())
    roots = {name for name in blocks if _is_listed(name, modules)} | _innermost(_conv_children(modules, 2), modules)
    roots = roots or _innermost(_conv_children(modules, 1), modules) or _innermost(_repeated(modules), modules)
    return {id(module) for name in roots for module in modules[name].modules()}


def linear_inside(model: nn.Module, blocks: dict[str, nn.Module], repeats: bool) -> set[int]:
    """Modules inside blocks, by id, as far as linear layers go.

    In a model in which nothing ``repeats``, such as a plain MLP, these are all linear layers but the last in the order
    of ``named_modules()``, which is taken for the output.
    """
    if blocks or repeats:
        return {id(module) for block in blocks.values() for module in block.modules()}
    return {id(module) for module in [m for m in model.modules() if is_linear(m)][:-1]}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in one of the forms, or may become one: nn.Linear, Conv1D, or ours."""
    ours = isinstance(module, (FormedLinear, ExpertStack)) and not has_conv_form(module)
    return ours or isinstance(module, nn.Linear) or is_transposed(module)


def _is_layer(module: nn.Module) -> bool:
    return is_linear(module) or is_convolution(module)


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether a module is a block of transformers that checkpoints its own forward pass if it is told to."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == _CHECKPOINTING_LAYER for cls in type(module).__mro__)


# ---- what repeats in lists


def _units(modules: dict[str, nn.Module]) -> set[str]:
    """What a model repeats: children of lists with two or more linear layers, else with one; and torch's own layers.

    A child of a ``Sequential`` has to be of a kind that stands in lists twice or more, since a ``Sequential`` also
    holds what comes before and after the blocks. A stage of several blocks gives way to them.
    """
    listed = {name: m for name, m in _children(modules, _LISTS) if not _is_layer(m)}
    kinds = Counter(map(_kind, listed.values()))
    linear = {name: sum(map(is_linear, m.modules())) for name, m in listed.items()}
    repeated = {name for name, m in listed.items() if kinds[_kind(m)] >= 2}
    units = {name for name, _ in _children(modules, nn.ModuleList) if linear.get(name, 0) >= 2}
    units |= {name for name, m in modules.items() if isinstance(m, _TORCH_BLOCKS)}
    in_sequence = {n for n, _ in _children(modules, nn.Sequential) if n in repeated and linear[n] >= 2} - units
    inside = _linear_inside_units(units | in_sequence, linear)
    units |= {name for name in in_sequence if 2 * inside[name] <= linear[name]}
    return units or {name for name in repeated if linear[name]}


def _linear_inside_units(units: set[str], linear: dict[str, int]) -> Counter[str]:
    """By the name of each module that holds units: how many linear layers stand in units inside of it, experts aside.
    Of units inside each other the outermost counts."""
    inside: Counter[str] = Counter()
    for unit in (unit for unit in units if "expert" not in unit.rpartition(".")[0]):
        for holder in reversed(list(_holders(unit))):
            inside[holder] += linear.get(unit, 0)
            if holder in units and "expert" not in holder.rpartition(".")[0]:
                break  # from there on outwards that one counts
    return inside


def _twins(roots: dict[str, nn.Module], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Modules with a linear layer of the class of a block, or of the class of what stands in a list inside a block.

    A U-Net's middle, and its ways down and up, hold the same parts in different numbers.
    """
    inside = [m for block in roots.values() for _, m in _children(dict(block.named_modules()), nn.ModuleList)]
    classes = {type(m) for m in (*roots.values(), *inside) if not _is_layer(m) and type(m) not in _CONTAINERS}
    for name, module in modules.items():
        if name and type(module) in classes and any(map(is_linear, module.modules())):
            yield name


def _kind(module: nn.Module) -> object:
    """What makes two modules alike: their class; of a container what it holds, with layers of all forms alike."""
    if _is_layer(module):
        return "linear" if is_linear(module) else "convolution"
    if type(module) in _CONTAINERS:
        return type(module), tuple(map(_kind, module.children()))
    return type(module)


def _children(modules: dict[str, nn.Module], holders: type | tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the children of all holders."""
    for name, holder in modules.items():
        for key, child in holder.named_children() if isinstance(holder, holders) else ():
            yield f"{name}.{key}" if name else key, child


def _conv_children(modules: dict[str, nn.Module], count: int) -> Iterator[str]:
    for name, child in _children(modules, _LISTS if count > 1 else nn.ModuleList):
        if _holds_convolutions(child, count) and not is_convolution(child):
            yield name


def _holds_convolutions(module: nn.Module, count: int) -> bool:
    """Whether a module holds so many layers, one of them a convolution."""
    inside = list(module.modules())
    convolutions = sum(map(is_convolution, inside))
    return bool(convolutions) and convolutions + sum(isinstance(each, nn.Linear) for each in inside) >= count


def _repeated(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Modules with a convolution and two or more layers, of a class that occurs twice or more, containers aside."""
    classes = Counter(type(module) for module in modules.values())
    for name, module in modules.items():
        if name and classes[type(module)] >= 2 and type(module) not in _CONTAINERS and _holds_convolutions(module, 2):
            yield name


# ---- names


def _outermost(found: Iterable[str], modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the found that stand in no other, in the order of the model."""
    found = set(found)
    return {name: m for name, m in modules.items() if name in found and not _stands_in(name, found)}


def _stands_in(name: str, others: set[str]) -> bool:
    return any(holder in others for holder in _holders(name))


def _holders(name: str) -> Iterator[str]:
    """Names of the modules that hold one, from the model inwards."""
    parts = name.split(".") if name else []
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def _innermost(names: Iterator[str], modules: dict[str, nn.Module]) -> set[str]:
    """Those of the found that hold more layers beside the found ones in them than inside these."""
    layers = {name: {id(m) for m in modules[name].modules() if _is_layer(m)} for name in names}
    inside: dict[str, set[int]] = {name: set() for name in layers}
    for name, held in layers.items():
        for holder in _holders(name):
            inside.get(holder, set()).update(held)
    return {name for name, held in layers.items() if 2 * len(inside[name]) < len(held)}


def _is_listed(name: str, modules: dict[str, nn.Module]) -> bool:
    return any(isinstance(modules.get(holder), _LISTS) for holder in _holders(name))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
