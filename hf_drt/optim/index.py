"""GroupIndex: where parameters stand in an optimizer's groups, looked up once for a change of any number of layers."""

import torch
from torch import nn

from hf_drt.forms import Adapter, Dense, Factored, Form, trainable_weights
from hf_drt.optim.owners import FORM, PARENT, number_of_group

KINDS: dict[type, str] = {Factored: "factored", Adapter: "adapter", Dense: "dense"}


class GroupIndex:
    """The groups of an optimizer as they are now; made anew after each change of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        groups = optimizer.param_groups
        self._home = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        self._parent: list[int] = [group.get(PARENT, index) for index, group in enumerate(groups)]
        self._form_groups: dict[tuple[int, str, int], int] = {
            (number_of_group(group), group[FORM], group[PARENT]): index
            for index, group in reversed(list(enumerate(groups)))
            if FORM in group
        }

    def home(self, name: str, module: nn.Module) -> int:
        """Index of the group of a layer's trainable weights.

        Raises:
            ValueError: A trainable weight of the layer is not in the optimizer, or they are in several groups.
        """
        found = [self._home.get(id(weight)) for weight in trainable_weights(module)]
        homes = {home for home in found if home is not None}
        if None in found:
            raise ValueError(
                f"the weights of {name} are not in the optimizer. Make it after the first phase is in force, as in "
                "drt.apply(0), over all trainable parameters; or pass it there: drt.apply(0, optimizer). To leave the "
                "layer out of dynamic-rank training use exclude=."
            )
        if len(homes) > 1:
            raise ValueError(
                f"the weights of {name} are in different parameter groups of the optimizer, but change form together. "
                "Put them into one; for a learning rate of their own use factored_lr_scale or adapter_lr_scale."
            )
        return homes.pop()

    def parent(self, home: int) -> int:
        """Index of the group that a form group was made from; of another group its own."""
        return self._parent[home]

    def destination(self, home: int, form: Form, number: int | None) -> int:
        """Index of the group in which a layer of the given form belongs, whose weights now are in group ``home``, and
        whose owner has this number."""
        parent = self._parent[home]
        kind = KINDS.get(type(form))
        return parent if number is None or kind is None else self._form_groups.get((number, kind, parent), parent)


def model_order(model: nn.Module) -> dict[int, int]:
    """Place of each of the model's parameters, by identity."""
    return {id(p): place for place, p in enumerate(model.parameters())}
