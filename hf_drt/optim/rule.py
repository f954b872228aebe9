"""What a change of form has to know of a class of optimizers: its rule, whose fields have the answers of most classes.

All that depends on the kind of optimizer is asked here: whether it is allowed, which of its state follows, what its
step takes, under which names the Trainer makes it. Errors, help texts and tables are made from the rules, so that a new
optimizer is one entry of :mod:`hf_drt.optim.registry`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

State = dict[str, Any]
Group = dict[str, Any]
Shape = tuple[int, ...]
Replaced = tuple[list[nn.Parameter], list[nn.Parameter]]  # a layer's trainable weights before and after


@dataclass(frozen=True)
class MomentKeys:
    """Names of an optimizer's per-parameter state: first moments, second moments. Empty: only reset is possible.

    Raises:
        TypeError: One is not a tuple of names.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for names in (self.first, self.second):
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"moments are named by a tuple of texts, as in first=('momentum',), got {names!r}.")


@dataclass(frozen=True)
class OwnRate:
    """When an optimizer computes its learning rate itself, whatever its group's ``lr`` says.

    Attributes:
        when: Whether it does, by a group's options.
        option: The option that makes it do so, as in ``relative_step=True``.
        instead: Arguments with which it applies the group's.
    """

    when: Callable[[Group], bool]
    option: str
    instead: str


def _same_shape(key: str, shape: Shape) -> Shape:
    return shape


def _nothing(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> State:
    return {}


def _always(optimizer: torch.optim.Optimizer) -> bool:
    return True


def _fit(optimizer: torch.optim.Optimizer) -> str:
    return ""


def _nobody(optimizer: torch.optim.Optimizer, changes: list[Replaced]) -> None:
    pass


def _nothing_else(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: None


def _as_it_is(group: Group) -> Group:
    return {}


@dataclass(frozen=True, eq=False)
class OptimizerRule:
    """What a change of form has to know of one class of optimizers.

    Attributes:
        help: What it is, and what of its state follows, in half a sentence.
        moments: State that follows by the chain rule under ``moments=project``.
        optim: Values of ``optim`` in TrainingArguments under which the Trainer makes it, with the arguments that it
            then passes, as far as they decide state or scratch memory.
        refused: Why it cannot follow a change of form, and what can; empty where it can.
        unfit: The same of one optimizer, by its options.
        matrices_alone: Whether it takes matrices alone.
        keeps: Whether the moments of one optimizer follow, by its options, as not where it has them in a few bits.
        anew: What of its state begins anew in any case, for a table.
        tested: The package and version that it has been run with, for a table.
        new_state: Gives a new weight the state that the optimizer does not make by itself at the weight's first step,
            as where its constructor does.
        state_shape: Shape of a state's entry, by its name and the parameter's shape, None where it is not known; of
            scalars it is not asked.
        own_rate: Where its groups' ``lr`` may be of no effect.
        handed_on: Tells those who know weights beside groups and state, such as a manager of the library, which
            weights take whose place; called once the groups hold the new ones.
        remembered: What ``handed_on`` changes: the returned function puts it back as it is now.
        compiled: Whether its step is compiled into few kernels, which keep what they make on the way out of memory.
        counts: Options of a group in which it counts the group's steps, with their values before the first. Weights
            that begin later than their group have counts of their own (:mod:`hf_drt.optim.counts`).
        late: Gives, of a group, options of such weights that go by the run's steps and not by theirs.
        averages: Whether weights in training are not those that it makes: ``eval()`` puts these in their place, and
            ``train()`` takes them back (:mod:`hf_drt.optim.averages`).
        without_step: Where it updates weights if not in ``step()``, around which rules could act.
        picks_layers: Whether it is made over layers that the Trainer picks among a model's dense ones.
        unsaved: What is in its checkpoints that nobody can load; empty where they can be resumed.
        nearest: The value of ``optim`` to take where this one cannot be used; empty where the reason says what.
        imported: The name that its class is imported by, where that is not its own behind its package's.
        sought: Entries that it looks for in the state of every parameter when it is loaded or copied, as torch's do.
            Those that the matrix optimizer trains have zeros there.
    """

    help: str
    moments: MomentKeys = MomentKeys()
    optim: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: str = ""
    unfit: Callable[[torch.optim.Optimizer], str] = _fit
    matrices_alone: bool = False
    keeps: Callable[[torch.optim.Optimizer], bool] = _always
    anew: str = ""
    tested: str = ""
    new_state: Callable[[torch.optim.Optimizer, nn.Parameter], State] = _nothing
    state_shape: Callable[[str, Shape], Shape | None] = _same_shape
    own_rate: OwnRate | None = None
    handed_on: Callable[[torch.optim.Optimizer, list[Replaced]], None] = _nobody
    remembered: Callable[[torch.optim.Optimizer], Callable[[], None]] = _nothing_else
    compiled: bool = False
    counts: Mapping[str, Any] = field(default_factory=dict)
    late: Callable[[Group], Group] = _as_it_is
    averages: bool = False
    without_step: str = ""
    picks_layers: bool = False
    unsaved: str = ""
    nearest: str = ""
    imported: str = ""
    sought: tuple[str, ...] = ("step",)

    def instead(self) -> str:
        """What to take in its place, as it stands behind a reason."""
        return f" The nearest that can is optim='{self.nearest}'." if self.nearest else ""

    @property
    def estimated(self) -> bool:
        """Whether what it takes is seen by a step of its own over any weight."""
        return not (self.refused or self.without_step or self.picks_layers)

    def carried(self) -> str:
        """What of its state 'project' takes along, for a table."""
        kinds = {"first": self.moments.first, "second": self.moments.second}
        found = [kind for kind, names in kinds.items() if names]
        return f"{' and '.join(found)} moments" if found else "nothing: its state starts anew"

    def moments_of(self, optimizer: torch.optim.Optimizer) -> MomentKeys:
        """The moments that follow in one optimizer."""
        return self.moments if self.keeps(optimizer) else MomentKeys()
