"""OPTIMIZERS: the rules by class, and the rule of an optimizer, or why it has none. An entry adds a class
(:mod:`hf_drt.optim.known`)::

    OPTIMIZERS.add("package.module.Class", OptimizerRule("what it is", MomentKeys(first=("momentum",))))
"""

import difflib
from collections.abc import Collection

import torch

from hf_drt.optim.rule import OptimizerRule
from hf_drt.optim.trial import UnfitError, tried
from hf_drt.registry import Registry

# By qualified name and not by isinstance: a third party's subclass may keep state that these rules do not know. Like
# any class without a rule it is tried (:mod:`hf_drt.optim.trial`).
OPTIMIZERS: Registry[OptimizerRule] = Registry("optimizer", "hf_drt.optim")


def qualified_name(cls: type) -> str:
    """The class's module and name: libraries share names such as AdamW."""
    return f"{cls.__module__}.{cls.__qualname__}"


def public_name(name: str) -> str:
    """The name that a class is imported by: torch.optim.AdamW for torch.optim.adamw.AdamW. The module that a library
    has for a class is named after it."""
    rule = OPTIMIZERS.get(name)
    if rule is not None and rule.imported:
        return rule.imported
    package, _, cls = name.rpartition(".")
    parent, _, module = package.rpartition(".")
    return f"{parent}.{cls}" if parent and module.replace("_", "") in cls.lower() else name


def known_rule(cls: type) -> OptimizerRule | None:
    """The registered rule of a class of optimizers; None where there is none."""
    return OPTIMIZERS.get(qualified_name(cls))


def rule_of(optimizer: torch.optim.Optimizer) -> OptimizerRule:
    """The rule of an optimizer that may follow a change of form: the registered one of its class, else what a trial on
    a copy has found, which is made at the first call for this optimizer.

    Raises:
        ValueError: The rule says why not, or the trial has failed.
    """
    name, rule = qualified_name(type(optimizer)), known_rule(type(optimizer))
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
        f"the optimizer {name} cannot follow a change of form: {reason} {nearest(public_name(name), allowed)} So can "
        "classes without a rule that pass a trial. In a Trainer optim=adamw_torch always can."
    )


def refuse(rule: OptimizerRule, called: str) -> None:
    """Raise where optimizers of a rule cannot follow a change of form.

    Args:
        called: What such an optimizer is called in the message.

    Raises:
        ValueError: With the reason.
    """
    if rule.refused:
        raise ValueError(f"{called} cannot follow a change of form: {rule.refused}{rule.instead()}")


def nearest(name: str, allowed: Collection[str]) -> str:
    """Some tens of names are no help in an error: how many there are, which are most like what was given, and where
    all of them stand."""
    like = difflib.get_close_matches(name, sorted(allowed), n=3, cutoff=0.0)
    return f"Of the {len(allowed)} that can, {_any_of(like)} is nearest by name; docs/optimizers.md has all."


def _any_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
