"""OPTIMIZERS: what is known of each optimizer that may meet a change of form, one rule for a class.

All that depends on the kind of optimizer is asked here: whether it is allowed, which of its state follows, what its
step takes, under which names the Trainer makes it. Errors, help texts and tables are made from the rules, so that a new
optimizer is one entry (:mod:`hf_drt.optim.known`)::

    OPTIMIZERS.add("package.module.Class", OptimizerRule("what it is", MomentKeys(first=("momentum",))))
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_drt.optim.trial import UnfitError, tried
from hf_drt.registry import Registry

State = dict[str, Any]
Group = dict[str, Any]
Shape = tuple[int, ...]


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


@dataclass(frozen=True, eq=False)
class OptimizerRule:
    """What a change of form has to know of one class of optimizers.

    Attributes:
        help: What it is, and what of its state follows, in half a sentence.
        moments: State that follows by the chain rule under ``moments=project``.
        optim: Values of ``optim`` in TrainingArguments under which the Trainer makes it, with the arguments that it
            then passes, as far as they decide state or scratch memory.
        refused: Why it cannot follow a change of form, and what can; empty where it can.
        new_state: Gives a new weight the state that the optimizer does not make by itself at the weight's first step,
            as where its constructor does.
        state_shape: Shape of a state's entry, by its name and the parameter's shape, None where it is not known; of
            scalars it is not asked.
        own_rate: Where its groups' ``lr`` may be of no effect.
    """

    help: str
    moments: MomentKeys = MomentKeys()
    optim: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: str = ""
    new_state: Callable[[torch.optim.Optimizer, nn.Parameter], State] = _nothing
    state_shape: Callable[[str, Shape], Shape | None] = _same_shape
    own_rate: OwnRate | None = None

    def carried(self) -> str:
        """What of its state 'project' takes along, for a table."""
        kinds = {"first": self.moments.first, "second": self.moments.second}
        found = [kind for kind, names in kinds.items() if names]
        return f"{' and '.join(found)} moments" if found else "nothing: its state starts anew"


# By qualified name and not by isinstance: a third party's subclass may keep state that these rules do not know. Like
# any class without a rule it is tried (:mod:`hf_drt.optim.trial`).
OPTIMIZERS: Registry[OptimizerRule] = Registry("optimizer", "hf_drt.optim")


def qualified_name(cls: type) -> str:
    """The class's module and name: libraries share names such as AdamW."""
    return f"{cls.__module__}.{cls.__qualname__}"


def rule_of(optimizer: torch.optim.Optimizer) -> OptimizerRule:
    """The rule of an optimizer that may follow a change of form: the registered one of its class, else what a trial on
    a copy has found, which is made at the first call for this optimizer.

    Raises:
        ValueError: The rule says why not, or the trial has failed.
    """
    name = qualified_name(type(optimizer))
    rule = OPTIMIZERS.get(name)
    if rule is None:
        return _tried_rule(optimizer, name)
    if rule.refused:
        raise _refusal(name, rule.refused)
    return rule


def _tried_rule(optimizer: torch.optim.Optimizer, name: str) -> OptimizerRule:
    try:
        found = tried(optimizer)
    except UnfitError as error:
        raise _refusal(
            name,
            f"it has no rule, and in a trial on small parameters {error} Let it keep what it knows of a parameter in "
            "self.state[parameter], made at the parameter's first step, or register what it needs: "
            f"hf_drt.optim.OPTIMIZERS.add('{name}', OptimizerRule(...)).",
        ) from error
    return OptimizerRule("a class of one's own", state_shape=lambda key, shape: shape if key in found.shaped else None)


def _refusal(name: str, reason: str) -> ValueError:
    allowed = sorted(public_name(known) for known, other in OPTIMIZERS.items() if not other.refused)
    return ValueError(
        f"the optimizer {name} cannot follow a change of form: {reason} Allowed are {', '.join(allowed)} "
        f"(optim={_any_of(list(optim_names()))}), and classes without a rule that pass a trial."
    )


def public_name(name: str) -> str:
    """The name that a class is imported by: torch.optim.AdamW for torch.optim.adamw.AdamW."""
    package, _, cls = name.rpartition(".")
    return f"{package.removesuffix('.' + cls.lower())}.{cls}"


def optim_names() -> dict[str, str]:
    """Values of ``optim`` whose optimizers may follow, each with the class's name here."""
    return {optim: name for name, rule in OPTIMIZERS.items() if not rule.refused for optim in rule.optim}


def maker(optim: str) -> tuple[OptimizerRule, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """The rule of a value of ``optim``, and what makes such an optimizer over parameters.

    Raises:
        ValueError: No optimizer of this name may follow.
    """
    names = optim_names()
    if optim not in names:
        raise ValueError(f"'{optim}' is not an optimizer of known state; allowed are {', '.join(names)}.")
    rule = OPTIMIZERS[names[optim]]

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return pkgutil.resolve_name(names[optim])(parameters, **rule.optim[optim])

    return rule, make


def optimizer_rows() -> Iterator[tuple[str, str, str, str]]:
    """A row for every optimizer that may follow, for a table: class, values of ``optim``, what it is, and what
    ``moments=project`` carries over."""
    for name, rule in OPTIMIZERS.items():
        if not rule.refused:
            yield public_name(name), ", ".join(rule.optim), rule.help, rule.carried()


def _any_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
