"""Exchange of layers inside a model, under every name and parent by which the model reaches them."""

from dataclasses import dataclass

from torch import nn

from hf_drt.forms import ExpertStack, attach, layer_of, place_of, stack_count


@dataclass(frozen=True)
class Swap:
    """One layer that changed form: its name in the model, the module before and the module after."""

    name: str
    old: nn.Module
    new: nn.Module


def replace(model: nn.Module, swaps: list[Swap]) -> None:
    """Put ``new`` wherever the model holds ``old``: a shared layer has several parents.

    Raises:
        ValueError: A layer is not in the model. Nothing has been replaced then.
    """
    stacks = [swap for swap in swaps if stack_count(swap.old) is not None]
    swaps = [swap for swap in swaps if stack_count(swap.old) is None]
    new_by_old = {id(swap.old): swap.new for swap in swaps}
    places = [
        (parent, attribute, new_by_old[id(child)])
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if id(child) in new_by_old
    ]
    found = {id(parent._modules[attribute]) for parent, attribute, _ in places}
    missing = [swap.name for swap in swaps if id(swap.old) not in found]
    missing += [swap.name for swap in stacks if not _holds(model, swap)]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not in the model any more. Something else has replaced it since the targets "
            "were found; build DynamicRank after all other changes to the model."
        )
    for parent, attribute, new in places:
        parent._modules[attribute] = new
    for swap in stacks:
        attach(*place_of(model, swap.name), swap.new)


def _holds(model: nn.Module, swap: Swap) -> bool:
    """Whether the model has these very weights of fused experts under their name."""
    try:
        layer = layer_of(model, swap.name)
    except AttributeError:
        return False
    return layer.weight is swap.old.weight if isinstance(swap.old, ExpertStack) else layer is swap.old
