"""Counts of steps per weight, for optimizers that keep them per group.

A bias correction or an average that goes by the group's count is wrong for a weight that has just been made: late in a
run Adam's correction of the second moment is 1, and ``g / sqrt((1 - beta2) g^2)`` is 32 times what a first step may be.
So a new weight has counts of its own. They are part of its state, which a checkpoint holds by the weight's place; for
the length of a step the weights with equal counts stand in a group with these. The number of groups that everybody else
sees, such as a learning-rate scheduler, never changes.
"""

import copy
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_drt.optim.nested_steps import outermost
from hf_drt.optim.registry import rule_of
from hf_drt.optim.rule import Group, OptimizerRule, State


def begun_counts(optimizer: torch.optim.Optimizer, weight: nn.Parameter, carried: State) -> State:
    """Counts of a new weight, which stands in its group: those that came with its state, those of the group where its
    state came without, else those of a beginning."""
    counts = rule_of(optimizer).counts
    if not counts or not carried:
        return copy.deepcopy(dict(counts))
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    return {key: copy.deepcopy(carried.get(key, group.get(key, begin))) for key, begin in counts.items()}


class OwnCounts:
    """The groups by counts, put in place by hooks around an optimizer's step; in any order with other hooks, since a
    group by counts has all options of the one that it is made from.

    A step that raises leaves them there. Whoever reads or changes the groups outside of a step calls :meth:`settle`
    first; the optimizer's ``state_dict`` and ``load_state_dict`` do so by hooks.
    """

    _installed: ClassVar["WeakKeyDictionary[torch.optim.Optimizer, OwnCounts]"] = WeakKeyDictionary()

    def __init__(self, optimizer: torch.optim.Optimizer, rule: OptimizerRule):
        self._rule = rule
        self._whole: list[tuple[Group, list[nn.Parameter]]] = []
        self._parts: list[Group] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_pre_hook(self._join)
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: self._join(optimizer))

    @classmethod
    def install(cls, optimizer: torch.optim.Optimizer) -> None:
        """Hook them on an optimizer whose rule has counts, once."""
        rule = rule_of(optimizer)
        if rule.counts and optimizer not in cls._installed:
            cls._installed[optimizer] = cls(optimizer, rule)

    @classmethod
    def settle(cls, optimizer: torch.optim.Optimizer) -> None:
        """Make the groups whole again where a step has raised."""
        if optimizer in cls._installed:
            cls._installed[optimizer]._join(optimizer)

    @outermost
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._join(optimizer)  # where the step before has raised
        groups = list(optimizer.param_groups)
        self._whole = [(group, group["params"]) for group in groups]
        for group in groups:
            self._parts += self._split(optimizer, group)
        optimizer.param_groups.extend(self._parts)

    def _split(self, optimizer: torch.optim.Optimizer, group: Group) -> list[Group]:
        """The weights of a group that have counts of their own, in groups of these; the others stay."""
        staying: list[nn.Parameter] = []
        parts: dict[tuple, Group] = {}
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            if not self._rule.counts.keys() <= state.keys():
                staying.append(weight)
                continue
            counts = {key: copy.deepcopy(state[key]) for key in self._rule.counts}
            part = group | self._rule.late(group) | counts | {"params": []}
            parts.setdefault(tuple(map(float, counts.values())), part)["params"].append(weight)
        group["params"] = staying
        return list(parts.values())

    @outermost
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for part in self._parts:
            for weight in part["params"]:
                optimizer.state[weight].update({key: copy.deepcopy(part[key]) for key in self._rule.counts})
        self._join(optimizer)

    def _join(self, optimizer: torch.optim.Optimizer) -> None:
        made = {id(part) for part in self._parts}
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in made]
        for group, params in self._whole:
            group["params"] = params
        self._whole, self._parts = [], []
