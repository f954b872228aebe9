"""OPTIMIZERS: what is known of each optimizer that may meet a change of form, one rule for a class.

All that depends on the kind of optimizer is asked here: whether it is allowed, which of its state follows, what its
step takes, under which names the Trainer makes it. Errors, help texts and tables are made from the rules, so that a new
optimizer is one entry (:mod:`hf_drt.optim.known`)::

    OPTIMIZERS.add("package.module.Class", OptimizerRule("what it is", MomentKeys(first=("momentum",))))
"""

import difflib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_drt.optim.trial import UnfitError, tried
from hf_drt.registry import Registry

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
        matrices: Whether it takes matrices alone.
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
    matrices: bool = False
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

    def instead(self) -> str:
        """What to take in its place, as it stands behind a reason."""
        return f" The nearest that can is optim='{self.nearest}'." if self.nearest else ""

    @property
    def estimated(self) -> bool:
        """Whether what it takes is seen by a step of its own over any weight."""
        return not (self.refused or self.without_step or self.picks_layers)

    sought: tuple[str, ...] = ("step",)

    def carried(self) -> str:
        """What of its state 'project' takes along, for a table."""
        kinds = {"first": self.moments.first, "second": self.moments.second}
        found = [kind for kind, names in kinds.items() if names]
        return f"{' and '.join(found)} moments" if found else "nothing: its state starts anew"

    def moments_of(self, optimizer: torch.optim.Optimizer) -> MomentKeys:
        """The moments that follow in one optimizer."""
        return self.moments if self.keeps(optimizer) else MomentKeys()


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
    if reason := rule.refused or rule.unfit(optimizer):
        raise _refusal(name, reason)
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
    allowed = {public_name(known) for known, other in OPTIMIZERS.items() if not (other.refused or other.unsaved)}
    return ValueError(
        f"the optimizer {name} cannot follow a change of form: {reason} {_nearest(public_name(name), allowed)} So can "
        "classes without a rule that pass a trial. In a Trainer optim=adamw_torch always can."
    )


def refuse_optim(optim: str) -> None:
    """Raise where a value of ``optim`` makes an optimizer that cannot follow a change of form.

    Raises:
        ValueError: With the reason.
    """
    for rule in OPTIMIZERS.values():
        if optim in rule.optim and rule.refused:
            raise ValueError(f"optim='{optim}' cannot follow a change of form: {rule.refused}{rule.instead()}")


def _nearest(name: str, allowed: Collection[str]) -> str:
    """Some tens of names are no help in an error: how many there are, which are most like what was given, and where
    all of them stand."""
    like = difflib.get_close_matches(name, sorted(allowed), n=3, cutoff=0.0)
    return f"Of the {len(allowed)} that can, {_any_of(like)} is nearest by name; docs/optimizers.md has all."


def public_name(name: str) -> str:
    """The name that a class is imported by: torch.optim.AdamW for torch.optim.adamw.AdamW. The module that a library
    has for a class is named after it."""
    rule = OPTIMIZERS.get(name)
    if rule is not None and rule.imported:
        return rule.imported
    package, _, cls = name.rpartition(".")
    parent, _, module = package.rpartition(".")
    return f"{parent}.{cls}" if parent and module.replace("_", "") in cls.lower() else name


def optim_names() -> dict[str, str]:
    """Values of ``optim`` whose optimizers may follow, each with the class's name here; of several classes with one
    rule the Trainer makes the first."""
    found: dict[str, str] = {}
    for name, rule in OPTIMIZERS.items():
        for optim in () if rule.refused else rule.optim:
            found.setdefault(optim, name)
    return found


def rule_of_name(optim: str) -> OptimizerRule | None:
    """The rule of a value of ``optim``, be it refused or not; None where nothing is known of it."""
    return next((rule for rule in OPTIMIZERS.values() if optim in rule.optim), None)


def estimated_names() -> dict[str, str]:
    """Those of :func:`optim_names` whose memory can be estimated."""
    return {optim: name for optim, name in optim_names().items() if OPTIMIZERS[name].estimated}


def maker(optim: str) -> tuple[OptimizerRule, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """The rule of a value of ``optim``, and what makes such an optimizer over parameters.

    Raises:
        ValueError: No optimizer of this name may follow, its memory is not seen by a step of its own, or its package is
            not installed.
    """
    refuse_optim(optim)
    names = estimated_names()
    if optim in optim_names() and optim not in names:
        raise ValueError(
            f"the memory of '{optim}' cannot be estimated: it goes by the backward pass, or by the layers that the "
            "optimizer is made for. Measure it in a short run, or estimate that of another one."
        )
    if optim not in names:
        raise ValueError(f"'{optim}' is not an optimizer of known state. {_nearest(optim, names)}")
    rule = OPTIMIZERS[names[optim]]
    try:
        cls = pkgutil.resolve_name(names[optim])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"optim='{optim}' is {public_name(names[optim])}, but {error.name} is not installed: pip install "
            "'hf-drt[optimizers]'."
        ) from None

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = cls(parameters, **rule.optim[optim])
        if rule.averages:
            optimizer.train()
        return optimizer

    return rule, make


def optimizer_rows() -> Iterator[tuple[str, str, str, str, str, str]]:
    """A row for every rule that follows, for a table: classes, values of ``optim``, what it is, what
    ``moments=project`` carries over, what begins anew in any case, and what it was tested with."""
    for names, rule in _by_rule():
        if not rule.refused:
            yield names, ", ".join(rule.optim), rule.help, rule.carried(), rule.anew, rule.tested


def refused_rows() -> Iterator[tuple[str, str, str, str]]:
    """A row for every rule that refuses, for a table: classes, values of ``optim``, why, and what it was tested
    with."""
    for names, rule in _by_rule():
        if rule.refused:
            yield names, ", ".join(rule.optim), rule.refused + rule.instead(), rule.tested


def _by_rule() -> Iterator[tuple[str, OptimizerRule]]:
    """Every rule with the public names of its classes."""
    classes: dict[int, list[str]] = {}
    for name, rule in OPTIMIZERS.items():
        classes.setdefault(id(rule), []).append(public_name(name))
    rules = {id(rule): rule for rule in OPTIMIZERS.values()}
    for key, names in classes.items():
        yield ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])]), rules[key]


def _any_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
