"""``nn.MultiheadAttention`` in a model: which are split into layers, at selection and for good, and joined again."""

import contextlib
from collections.abc import Collection, Iterator
from typing import TypeGuard

from torch import nn

from hf_drt.engines import is_wrapper, whole_size
from hf_drt.forms import PROJECTIONS, SplitAttention, own_behaviour, packed_parameters, split_attentions
from hf_drt.targets.holders import held_elsewhere
from hf_drt.targets.surgery import Swap, replace


def split_attention(model: nn.Module, layers: Collection[str] | None = None) -> list[str]:
    """Take the ``nn.MultiheadAttention`` of a model apart into layers, with the same function and state dict.

    :class:`hf_drt.DynamicRank` does so by itself. Call it before DistributedDataParallel or FSDP2 is put around a model
    where that comes first: it would hold the parameters of the packed modules.

    Args:
        model: Holds them.
        layers: Names of layers such as ``blocks.0.attn.q_proj``: only the attention that one of these is in.

    Returns:
        The names of those that were split.
    """
    if not any(map(_is_packed, model.modules())):
        return []
    owners = None if layers is None else {name.rpartition(".")[0] for name in layers}
    found = {name: module for name, module in splittable(model).items() if owners is None or name in owners}
    replace(model, [Swap(name, module, SplitAttention(module)) for name, module in found.items()])
    return list(found)


def join_attention(model: nn.Module) -> list[str]:
    """Put packed ``nn.MultiheadAttention`` modules back in the place of split ones whose layers are all dense.

    Returns:
        The names of those that were joined. Their weights are new parameters.
    """
    found = {name: module for name, module in split_attentions(model) if module.all_dense}
    unique = {id(module): (name, module) for name, module in reversed(found.items())}
    replace(model, [Swap(name, module, module.joined()) for name, module in unique.values()])
    return list(found)


@contextlib.contextmanager
def attention_split(model: nn.Module) -> Iterator[None]:
    """In the block, packed attention looks as it would if it were split; its layers are views of its weights."""
    swaps = [Swap(name, m, SplitAttention(m, copied=False)) for name, m in splittable(model).items()]
    replace(model, swaps)
    try:
        yield
    finally:
        replace(model, [Swap(swap.name, swap.new, swap.old) for swap in swaps])


def splittable(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """The packed attention that can be split, by name.

    Left as they are: subclasses of ``nn.MultiheadAttention``, modules with hooks or functions of their own, with
    weights that others hold too, parametrized, sharded or quantized ones, and the model itself if it is one.
    """
    found = {name: m for name, m in model.named_modules() if name and _is_packed(m)}
    if not found or is_wrapper(model):
        return {}
    elsewhere = held_elsewhere(model)
    holders = _holders(model)
    return {
        name: m
        for name, m in found.items()
        if id(m) not in elsewhere
        and own_behaviour(m.out_proj) is None
        and _is_plain(m)
        and all(id(p) not in elsewhere and holders[id(p)] == 1 for p in packed_parameters(m).values())
    }


def _is_packed(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return type(module) is nn.MultiheadAttention


def _is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether it has what its class has, and nothing more."""
    hooks = any(value for name, value in vars(module).items() if "hook" in name and isinstance(value, dict))
    own = any(callable(value) for name, value in vars(module).items() if name not in vars(nn.Module()))
    parameters = packed_parameters(module).values()
    whole = all(type(p) is nn.Parameter and whole_size(p) == p.numel() and p.is_floating_point() for p in parameters)
    children = set(module._modules) == {"out_proj"} and not set(PROJECTIONS) & vars(module).keys()
    return whole and children and not hooks and not own and not hasattr(module, "parametrizations")


def _holders(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its id."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts
