"""Optimizers with which a run would go wrong: refused in the constructor by name, with the nearest that can."""

from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from hf_drt.config import DRTConfig
from hf_drt.optim import (
    OptimizerRule,
    check_step,
    known_rule,
    public_name,
    qualified_name,
    refuse,
    rule_of_name,
    unwrap,
)
from hf_drt.trainer.rates import makes_its_optimizer


def refuse_optimizer(trainer: Any, config: DRTConfig) -> None:
    """Raise where what is known of the optimizer that the trainer has, or is told to make, speaks against this run.

    Raises:
        ValueError: It cannot follow a change of form; its checkpoints could not be resumed; the Trainer would not call
            it; or a setting acts around a step that it does not make.
    """
    rule, called = _known(trainer)
    if rule is None:
        return
    refuse(rule, called)
    _refuse_unsaved(rule, called, trainer.args, config)
    _refuse_without_step(rule, called, OptimizerNames(trainer.args.optim).value)
    check_step(rule, called, config)


def refuse_unsaved(optimizer: torch.optim.Optimizer, args: Any, config: DRTConfig) -> None:
    """Raise where an optimizer's state will be saved, but could not be loaded.

    Raises:
        ValueError: That is so.
    """
    kind = type(unwrap(optimizer))
    if (rule := known_rule(kind)) is not None:
        _refuse_unsaved(rule, _called(kind), args, config)


def picks_layers(trainer: Any) -> bool:
    """Whether the Trainer will pick the layers that its optimizer is made for among those that are dense."""
    rule, _ = _known(trainer)
    return trainer.optimizer is None and rule is not None and rule.picks_layers


def _refuse_unsaved(rule: OptimizerRule, called: str, args: Any, config: DRTConfig) -> None:
    asked = {
        f"save_strategy={args.save_strategy.value}": args.save_strategy != SaveStrategy.NO,
        "drt_save_at_switch": config.save_at_switch,
        "enable_jit_checkpoint": args.enable_jit_checkpoint,
    }
    saves = ", ".join(name for name, on in asked.items() if on)
    if rule.unsaved and saves and not args.save_only_model:
        raise ValueError(
            f"{called} cannot be resumed: a checkpoint ({saves}) would hold {rule.unsaved}. Set save_strategy=no or "
            f"save_only_model=True.{rule.instead()}"
        )


def _refuse_without_step(rule: OptimizerRule, called: str, optim: str) -> None:
    if rule.without_step and rule.optim and optim not in rule.optim:
        raise ValueError(
            f"{called} updates the weights {rule.without_step}, for which the Trainer looks at optim alone: with "
            f"optim='{optim}' it would leave weights out, and ignore the learning rate's schedule. Set "
            f"optim='{next(iter(rule.optim))}' too."
        )


def _known(trainer: Any) -> tuple[OptimizerRule | None, str]:
    """The rule of the optimizer, if there is one, and what it is called where the user has chosen it."""
    if trainer.optimizer is not None:
        kind = type(unwrap(trainer.optimizer))
    elif trainer.optimizer_cls_and_kwargs is not None:
        kind = trainer.optimizer_cls_and_kwargs[0]
    elif makes_its_optimizer(trainer):
        return None, ""
    else:
        optim = OptimizerNames(trainer.args.optim).value
        return rule_of_name(optim), f"optim='{optim}'"
    return (known_rule(kind), _called(kind)) if isinstance(kind, type) else (None, "")


def _called(kind: type) -> str:
    return f"the optimizer {public_name(qualified_name(kind))}"
