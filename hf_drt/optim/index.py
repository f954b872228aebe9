"""GroupIndex: where parameters stand in an optimizer's groups, looked up once for a change of any number of layers."""

import torch
from torch import nn

from hf_drt.forms import Adapter, Dense, Factored, form_of, trainable_weights
from hf_drt.optim.owners import FORM, PARENT, SIDE, number_of_group
from hf_drt.optim.sides import Side, sides

KINDS: dict[type, str] = {Factored: "factored", Adapter: "adapter", Dense: "dense"}


class GroupIndex:
    """The groups of an optimizer as they are now; made anew after each change of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        groups = optimizer.param_groups
        self._home = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        self._parent: list[int] = [group.get(PARENT, index) for index, group in enumerate(groups)]
        self._form_groups: dict[tuple[int, str, Side, int], int] = {
            (number_of_group(group), group[FORM], group.get(SIDE), group[PARENT]): index
            for index, group in reversed(list(enumerate(groups)))
            if FORM in group
        }

    def homes(self, name: str, module: nn.Module) -> list[int]:
        """Index of the group of each of a layer's trainable weights: one group, or the form groups of one.

        Raises:
            ValueError: A trainable or frozen weight of the layer is not in the optimizer, or they come from several
                groups.
        """
        found = [self._home.get(id(weight)) for weight in trainable_weights(module)]
        homes = [home for home in found if home is not None]
        if len(homes) < len(found) and isinstance(form := form_of(module), Dense) and form.frozen:
            raise ValueError(
                f"the weight of {name} is frozen in this phase, and not in the optimizer, in which it keeps its place. "
                "Make the optimizer after the first phase is in force, as in drt.apply(0), and resume with it: "
                "drt.load_state_dict(state, optimizer); or make it over model.parameters()."
            )
        if len(homes) < len(found):
            raise ValueError(
                f"the weights of {name} are not in the optimizer. Make it after the first phase is in force, as in "
                "drt.apply(0), over all trainable parameters; or pass it there: drt.apply(0, optimizer). To leave the "
                "layer out of dynamic-rank training use exclude=."
            )
        if len({self._parent[home] for home in homes}) > 1:
            raise ValueError(
                f"the weights of {name} are in different parameter groups of the optimizer, but change form together. "
                "Put them into one; for learning rates of their own use factored_lr_scale, adapter_lr_scale, "
                "left_lr_scale or right_lr_scale."
            )
        return homes

    def parent(self, homes: list[int]) -> int:
        """Index of the group that a layer's form groups were made from; of another group its own."""
        return self._parent[homes[0]]

    def destinations(self, module: nn.Module, parent: int, number: int | None) -> list[int]:
        """Index of the group in which each of a layer's trainable weights belongs, by its form and side.

        Args:
            module: The layer in its new form.
            parent: As :meth:`parent` gives it, of the layer as it is in the optimizer now.
            number: Its owner's.
        """
        return [self._destination(module, side, parent, number) for side in sides(module)]

    def _destination(self, module: nn.Module, side: Side, parent: int, number: int | None) -> int:
        kind = KINDS.get(type(form_of(module)))
        if number is None or kind is None:
            return parent
        both = self._form_groups.get((number, kind, None, parent), parent)
        return self._form_groups.get((number, kind, side, parent), both)


def model_order(model: nn.Module) -> dict[int, int]:
    """Place of each of the model's parameters, by identity."""
    return {id(p): place for place, p in enumerate(model.parameters())}
