"""Is a group's ``lr`` the rate that the optimizer applies, and in ``step()``? Rules that scale it would do nothing."""

from typing import Any

import torch
import torch.distributed as dist

from hf_drt.config import DRTConfig
from hf_drt.optim.groups import NEED_GROUPS, given_of
from hf_drt.optim.matrices import MATRIX_LR
from hf_drt.optim.owners import without_matrices
from hf_drt.optim.registry import known_rule
from hf_drt.optim.rule import OptimizerRule, OwnRate

_OFF: dict[str, Any] = {"rewarmup_steps": 0, **NEED_GROUPS}


def own_rate(optimizer: torch.optim.Optimizer, mine: set[int] | None = None) -> OwnRate | None:
    """How the optimizer computes its learning rate itself, whatever a scheduler says, if it does.

    Args:
        mine: Identities of the parameters whose groups are looked at; None: all.
    """
    rule = known_rule(type(optimizer))
    if rule is None or rule.own_rate is None:
        return None
    groups = (g for g in optimizer.param_groups if mine is None or any(id(p) in mine for p in g["params"]))
    return rule.own_rate if any(map(rule.own_rate.when, groups)) else None


def scaling(config: DRTConfig) -> str:
    """The settings that scale the learning rate, as they are given; empty if none is."""
    return ", ".join(given_of(config, _OFF))


def check_rate(optimizer: torch.optim.Optimizer, config: DRTConfig, mine: set[int] | None = None) -> None:
    """Whether the settings that scale the learning rate can act.

    Args:
        mine: Identities of the parameters in whose groups they act; None: in all.

    Raises:
        ValueError: They cannot.
    """
    found = scaling(config)
    name = type(optimizer).__name__
    if (rule := known_rule(type(optimizer))) is not None:
        check_step(rule, name, config)
    if found and (rate := own_rate(optimizer, mine)) is not None:
        raise ValueError(
            f"{found}: this needs the learning rate of the optimizer's groups, but {name} with {rate.option} "
            f"computes its own and does not read it. Use {name}(params, {rate.instead}), or AdamW. "
            f"{config.leave_out} otherwise.{config.without_matrix_optimizer}"
        )


def check_matrix_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the matrices' rate is their own, as far as it can be told yet: not while all rates are 0.

    Raises:
        ValueError: A scheduler or a loop has given all groups one rate, and it is not ``matrix_lr``.
    """
    groups = optimizer.param_groups
    asked = {group[MATRIX_LR] for group in groups if MATRIX_LR in group}
    if not asked:
        return True
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups if group["params"]}
    if len(rates) > 1 or rates == asked:
        return True
    if rates == {0.0}:
        return False
    raise ValueError(
        f"matrix_lr={max(asked):g} has no effect: all parameter groups have the learning rate {max(rates):g}, as a "
        "scheduler that sets rates gives them (OneCycleLR, CyclicLR), or a loop with group['lr'] = lr. Take one that "
        "multiplies each group's own rate, as those of the Trainer and LambdaLR do, or set matrix_lr to that rate."
        f"{without_matrices(optimizer)}"
    )


def check_step(rule: OptimizerRule, called: str, config: DRTConfig) -> None:
    """Whether what acts around ``optimizer.step()`` can: settings, and the averaging of gradients over processes; and
    whether the matrix optimizer's step beside it would be all that the weights have of one.

    Args:
        rule: Of the optimizer.
        called: What it is called in the message.

    Raises:
        ValueError: They cannot.
    """
    if rule.averages and config.uses_matrix_optimizer:
        raise ValueError(
            f"matrix_optimizer={config.matrix_optimizer}: {called} averages the weights within its own "
            "step, and warms up there (warmup_steps). The matrices have no part in it, and would be evaluated as they "
            f"are, next to averages. {config.leave_out}, or take optim='adamw_torch' with a scheduler."
            f"{config.without_matrix_optimizer}"
        )
    if rule.picks_layers and config.uses_matrix_optimizer:
        raise ValueError(
            f"matrix_optimizer={config.matrix_optimizer} and {called} are for the same weights, and only one can train "
            f"them. {config.leave_out}, or take optim='adamw_torch' for the others.{config.without_matrix_optimizer}"
        )
    if not rule.without_step:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{called} cannot train on several processes, with or without hf_drt: it updates the weights "
            f"{rule.without_step}, before gradients are averaged, so that each process would train a model of its own. "
            f"Start one process, or take the nearest that can, optim='{rule.nearest}'."
        )
    if found := scaling(config):
        raise ValueError(
            f"{found}: this acts around optimizer.step(), but {called} cannot be reached there: it updates the weights "
            f"{rule.without_step}. {config.leave_out}, or take the nearest that can, optim='{rule.nearest}'."
            f"{config.without_matrix_optimizer}"
        )
