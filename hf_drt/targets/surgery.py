"""Exchange of layers inside a model, under every name and parent by which the model reaches them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_drt.forms import ExpertStack, attach, layer_of, place_of, stack_count


@dataclass(frozen=True)
class Swap:
    """One layer that changed form: its name in the model, the module before and the module after."""

    name: str
    old: nn.Module
    new: nn.Module


class Places:
    """Where a model holds some of its layers: looked up once, however often and in whatever order they are exchanged.

    Keeps no layer alive.

    Args:
        model: Holds the layers.
        layers: By name. A shared layer has several places.

    Raises:
        ValueError: A layer is not in the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        stacks = {name for name, layer in layers.items() if stack_count(layer) is not None}
        held: dict[int, list[tuple[nn.Module, str]]] = {
            id(layer): [] for name, layer in layers.items() if name not in stacks
        }
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                if id(child) in held:
                    held[id(child)].append((parent, attribute))
        self._held = {name: held[id(layer)] for name, layer in layers.items() if name not in stacks}
        missing = [name for name, places in self._held.items() if not places]
        missing += [name for name in stacks if not _holds(model, name, layers[name])]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} is not in the model any more. Something else has replaced it since the targets "
                "were found; build DynamicRank after all other changes to the model."
            )
        self._stacks = {name: place_of(model, name) for name in stacks}

    def put(self, layers: Mapping[str, nn.Module]) -> None:
        """Put each of these in the place of the layer of its name."""
        for name, layer in layers.items():
            if name in self._stacks:
                attach(*self._stacks[name], layer)
            else:
                for parent, attribute in self._held[name]:
                    parent._modules[attribute] = layer


def replace(model: nn.Module, swaps: list[Swap]) -> None:
    """Put ``new`` wherever the model holds ``old``: a shared layer has several parents.

    Raises:
        ValueError: A layer is not in the model. Nothing has been replaced then.
    """
    Places(model, {swap.name: swap.old for swap in swaps}).put({swap.name: swap.new for swap in swaps})


def _holds(model: nn.Module, name: str, old: nn.Module) -> bool:
    """Whether the model has these very weights of fused experts under their name."""
    try:
        layer = layer_of(model, name)
    except AttributeError:
        return False
    return layer.weight is old.weight if isinstance(old, ExpertStack) else layer is old
