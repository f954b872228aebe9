"""An optimizer that was made before packed attention was split follows the split."""

from typing import Any

import torch
from torch import nn

from hf_drt.forms import SplitAttention, split_attentions
from hf_drt.optim.index import model_order


def follow_split(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put the layers' weights in the place of the packed ones (:func:`hf_drt.split_attention`), in the model's order.

    Raises:
        ValueError: It has made steps with a packed weight, whose state would be lost.
    """
    attentions = [module for _, module in split_attentions(model)]
    found = {id(p): parts for g in optimizer.param_groups for p in g["params"] if (parts := _parts(attentions, p))}
    if any(id(p) in found and state for p, state in optimizer.state.items()):
        raise ValueError(
            "the optimizer has made steps with the packed weights of nn.MultiheadAttention, which have been split into "
            "layers since. Call hf_drt.split_attention(model), or build DynamicRank, before the first step."
        )
    places = model_order(model)
    for group in optimizer.param_groups:
        if not found.keys().isdisjoint(map(id, group["params"])):
            _splice(group, found, places, {id(p): name for name, p in model.named_parameters()})


def _parts(attentions: list[SplitAttention], parameter: nn.Parameter) -> list[nn.Parameter]:
    return next(filter(None, (attention.parts_of(parameter) for attention in attentions)), [])


def _splice(
    group: dict[str, Any], found: dict[int, list[nn.Parameter]], places: dict[int, int], names: dict[int, str]
) -> None:
    """Sorted where the parameters stood in the model's order, as far as those can tell that stay."""
    old, named = group["params"], dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
    stay = [places[id(p)] for p in old if id(p) in places]
    new = [part for p in old for part in found.get(id(p), [p])]
    if stay == sorted(stay) and all(id(p) in places for p in new):
        new.sort(key=lambda p: places[id(p)])
    group["params"] = new
    if named:
        group["param_names"] = [named.get(id(p), names.get(id(p), "")) for p in new]
