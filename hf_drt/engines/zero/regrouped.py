"""Regrouped: a torch optimizer over a model's parameters, whose work DeepSpeed does with another one over flat tensors.

The *outer* optimizer is what everybody else knows: its groups hold the model's parameters, a learning-rate scheduler
sets their rates, and a change of form puts new parameters in the places of old ones. The *inner* one is DeepSpeed's. It
has a group for each of the outer ones that is not empty, and where the parameters of one have made different numbers of
steps, one for each of these: the state of a flat tensor has a single count of steps, and a new weight under the count
of an old one would have its bias corrected for steps that it has not made. Before each step the inner groups take the
options of their outer ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_drt.engines.zero.layout import places

OUTER = "drt_outer"  # in an inner group: index of the outer one
STEP = "step"  # the count, in the state of every optimizer that has one
Group = dict[str, Any]


class Regrouped:
    """What stands in Accelerate's wrapper in the place of DeepSpeed's optimizer, and answers for it.

    Args:
        outer: The optimizer over the model's parameters.
        scales: Gives, of ``outer``, what the rate of each group is multiplied with in the step to come.

    Attributes:
        zero: DeepSpeed's optimizer, whose ``optimizer`` is the inner one.
    """

    def __init__(self, outer: torch.optim.Optimizer, scales: Callable[[torch.optim.Optimizer], list[float]]):
        self.outer = outer
        self._scales = scales
        self.zero: Any = None
        self._inner: Any = None
        self._handles: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name == "zero":  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self.zero, name)

    @property
    def param_groups(self) -> list[Group]:
        """Those of the outer optimizer."""
        return self.outer.param_groups

    def attach(self, zero: Any) -> None:
        """DeepSpeed's optimizer does the work from now on."""
        self.zero = zero
        if self._inner is not zero.optimizer:
            for handle in self._handles:
                handle.remove()
            self._inner = zero.optimizer
            self._handles = [self._inner.register_step_pre_hook(self._before)]

    def detach(self) -> None:
        """DeepSpeed's optimizer is gone; the inner one, with what is hooked on it, goes into the next."""
        self.zero = None

    def _before(self, inner: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        scales = self._scales(self.outer)
        for group in inner.param_groups:
            index = group[OUTER]
            group.update(options_of(self.outer.param_groups[index]))
            if scales[index] != 1:
                group["lr"] = group["lr"] * scales[index]

    def counts(self, names: Mapping[nn.Parameter, str]) -> dict[str, float]:
        """How many steps each parameter has made, by its name; empty where all have made as many."""
        state = self.zero.optimizer.state
        found = {names[p]: count_of(state.get(place.flat, {})) for p, place in places(self.zero)}
        return found if len(set(found.values())) > 1 else {}


def count_of(state: Mapping[str, Any]) -> float:
    """Steps that the weight of this state has made; 0 where it has none, or its optimizer does not count."""
    return float(state.get(STEP, 0))


def options_of(group: Group) -> Group:
    """A group's options, without its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def inner_groups(
    outer: Iterable[Group], count: Callable[[nn.Parameter], float], defaults: Mapping[str, Any]
) -> list[Group]:
    """The inner groups, by outer group and number of steps, each with its parameters in the outer order.

    Args:
        count: Steps that a parameter has made.
        defaults: Options of the inner optimizer, where its class has more than the outer one's.
    """
    groups: list[Group] = []
    for index, group in enumerate(outer):
        by_count: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.requires_grad:
                by_count[count(parameter)].append(parameter)
        groups += [
            {**defaults, **options_of(group), "params": parameters, OUTER: index}
            for _, parameters in sorted(by_count.items())
        ]
    return groups


def inner_optimizer(outer: torch.optim.Optimizer, groups: list[Group]) -> torch.optim.Optimizer:
    """Another optimizer of the same class over these groups, without state and without the outer one's hooks."""
    inner = type(outer).__new__(type(outer))
    inner.__setstate__({"defaults": dict(outer.defaults), "state": defaultdict(dict), "param_groups": groups})
    return inner
