"""Who owns what in an optimizer: several controllers may train through one, each with rules for its own weights.

An owner's form groups carry its number, so that they are told apart in the optimizer's state dict too; those of the
first owner carry none, as where there is only one. Numbers follow the order in which owners enter.

Nothing here keeps a model or a controller alive. The form groups outlive their controller; its re-warm-up does not.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_drt.forms import layer_of
from hf_drt.optim.rule import Group
from hf_drt.targets import is_layer

FORM, SIDE, PARENT, OWNER = "drt_form", "drt_side", "drt_parent", "drt_owner"


@dataclass(eq=False)
class Owner:
    """One controller's part in one optimizer.

    Attributes:
        names: Its target layers in ``model``, as the keys, in order.
        factor: Gives the share of the scheduled LR in force (:func:`hf_drt.optim.rewarmup_factor`).
        rewarms: Whether that share is ever below 1.
        scales: Whether it has form groups.
        made_in: Phase that the model was in when the optimizer was made; None: before the first.
        number: What its form groups are marked with.
        without_matrices: What a message that refuses its matrix optimizer adds
            (:attr:`hf_drt.DRTConfig.without_matrix_optimizer`).
    """

    model: weakref.ref[nn.Module]
    names: dict[str, None]
    factor: weakref.WeakMethod
    rewarms: bool
    scales: bool
    made_in: int | None = None
    number: int = 0
    without_matrices: str = ""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        names: Iterable[str],
        factor: Callable[[], float],
        rewarms: bool,
        scales: bool,
        made_in: int | None,
        without_matrices: str = "",
    ) -> "Owner":
        """An owner that has not entered an optimizer yet; ``factor`` is a method of its controller."""
        layers, share = dict.fromkeys(names), weakref.WeakMethod(factor)
        return cls(weakref.ref(model), layers, share, rewarms, scales, made_in, without_matrices=without_matrices)

    def share(self) -> float:
        """Share of the scheduled LR in force; 1 once the controller is gone."""
        factor = self.factor()
        return 1.0 if factor is None else factor()

    def parameters(self) -> set[int]:
        """Identities of the model's parameters."""
        model = self.model()
        return set() if model is None else {id(p) for p in model.parameters()}

    def layers(self) -> set[int]:
        """Identities of the target layers' parameters."""
        return {id(p) for module in self.modules() for p in module.parameters()}

    def modules(self) -> Iterator[nn.Module]:
        """The target layers that are still there."""
        model = self.model()
        found = (_layer(model, name) for name in self.names) if model is not None else ()
        return (module for module in found if module is not None)


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    try:
        layer = layer_of(model, name)
    except AttributeError:  # gone
        return None
    return layer if is_layer(layer) else None  # or something else has taken its place


_OWNERS: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Owner]] = weakref.WeakKeyDictionary()


def owners(optimizer: torch.optim.Optimizer) -> list[Owner]:
    """The owners in an optimizer, by number."""
    return list(_OWNERS.get(optimizer, []))


def without_matrices(optimizer: torch.optim.Optimizer) -> str:
    """What a message that refuses the matrix optimizer of any owner adds."""
    return "".join(dict.fromkeys(owner.without_matrices for owner in owners(optimizer)))


def set_owners(optimizer: torch.optim.Optimizer, found: list[Owner]) -> None:
    """Put a list of :func:`owners` in force."""
    _OWNERS[optimizer] = sorted(found, key=lambda owner: owner.number)


def entry(optimizer: torch.optim.Optimizer, owner: Owner) -> Callable[[], None]:
    """Give an owner its number; the returned function makes it one of the optimizer's. Those whose layers it takes over
    leave then; it has their number, and with it their form groups.

    Raises:
        ValueError: As in :func:`_check_apart`.
    """
    before, others = _taken_over(optimizer, owner)
    _check_apart(optimizer, owner, others)
    if before:
        owner.number, owner.made_in = before[0].number, before[0].made_in
    else:
        owner.number = _free_number(optimizer, owner, {other.number for other in others})
    return lambda: set_owners(optimizer, [*others, owner])


def _free_number(optimizer: torch.optim.Optimizer, owner: Owner, taken: set[int]) -> int:
    """The number of the form groups that a copied optimizer has of this owner, if it has any, else the next."""
    layers, groups = owner.layers(), optimizer.param_groups
    left = [group for group in groups if FORM in group and number_of_group(group) not in taken]
    for homes in (lambda group: [group], lambda group: [group, groups[group[PARENT]]]):
        found = {number_of_group(g) for g in left if any(id(p) in layers for home in homes(g) for p in home["params"])}
        if found:
            return min(found)
    return max(taken | {number_of_group(group) for group in left}, default=-1) + 1


def _taken_over(optimizer: torch.optim.Optimizer, owner: Owner) -> tuple[list[Owner], list[Owner]]:
    """The present owners that share a layer with this one, and the others."""
    layers, before, others = owner.layers(), [], []
    for other in owners(optimizer):
        (before if layers & other.layers() else others).append(other)
    return before, others


def _check_apart(optimizer: torch.optim.Optimizer, owner: Owner, others: list[Owner]) -> None:
    """A re-warm-up scales the rate of whole groups.

    Raises:
        ValueError: It would scale that of another owner's model.
    """
    for other in others:
        for one, foreign in ((owner, other), (other, owner)):
            if not one.rewarms or one.factor() is None:
                continue
            mine = one.parameters()
            theirs = foreign.parameters() - mine
            for index, group in enumerate(optimizer.param_groups):
                present = {id(p) for p in group["params"]}
                if present & mine and present & theirs:
                    raise ValueError(
                        "rewarmup_steps scales the learning rate of whole parameter groups after a switch, but group "
                        f"{index} of the optimizer holds the weights of two models that change form apart from each "
                        "other. Give each model a parameter group of its own: [{'params': first.parameters()}, "
                        "{'params': second.parameters()}]; or set rewarmup_steps=0."
                    )


def number_of(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> int | None:
    """The number of the owner of a layer; None where it has none yet."""
    for owner in owners(optimizer):
        if owner.model() is model and name in owner.names:
            return owner.number
    return None


def optimizer_made_in(optimizer: torch.optim.Optimizer | None, model: nn.Module, names: Iterable[str]) -> int | None:
    """The phase that the model was in when its optimizer was made, None if before the first: parameter groups that go
    by names or shapes are those of that phase, whatever the model's form is now. 0 where none is known."""
    found = owners(optimizer) if optimizer is not None else []
    mine = (owner for owner in found if owner.model() is model and not owner.names.keys().isdisjoint(names))
    return next((owner.made_in for owner in mine), 0)


def form_groups(optimizer: torch.optim.Optimizer, number: int) -> list[Group]:
    """The form groups of an owner."""
    return [group for group in optimizer.param_groups if FORM in group and number_of_group(group) == number]


def mark(number: int) -> dict[str, int]:
    """What marks the form groups of an owner."""
    return {OWNER: number} if number else {}


def number_of_group(group: Group) -> int:
    """The number of the owner of a form group."""
    return group.get(OWNER, 0)


def rewarmup_factors(optimizer: torch.optim.Optimizer) -> list[float]:
    """Share of the scheduled LR in force, of every group: the least of those owners whose models it holds weights of.

    Of two owners in one model each re-warms what both train; the least share and not the product, so that two that
    switch at the same step do what one would.
    """
    shares = [1.0] * len(optimizer.param_groups)
    for owner in owners(optimizer):
        if (share := owner.share()) != 1:
            mine = owner.parameters()
            for index, group in enumerate(optimizer.param_groups):
                if any(id(p) in mine for p in group["params"]):
                    shares[index] = min(shares[index], share)
    return shares
