"""Values of ``optim`` in TrainingArguments: the rules that they name, and what makes such an optimizer."""

import pkgutil
from collections.abc import Callable

import torch
from torch import nn

from hf_drt.optim.registry import OPTIMIZERS, nearest, public_name, refuse
from hf_drt.optim.rule import OptimizerRule


def refuse_optim(optim: str) -> None:
    """Raise where a value of ``optim`` makes an optimizer that cannot follow a change of form.

    Raises:
        ValueError: With the reason.
    """
    for rule in OPTIMIZERS.values():
        if optim in rule.optim:
            refuse(rule, f"optim='{optim}'")


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
        raise ValueError(f"'{optim}' is not an optimizer of known state. {nearest(optim, names)}")
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
