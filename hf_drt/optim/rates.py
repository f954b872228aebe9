"""Is a group's ``lr`` the rate that the optimizer applies? Rules that scale it would do nothing."""

import torch

from hf_drt.config import DRTConfig
from hf_drt.optim.registry import OPTIMIZERS, OwnRate, qualified_name

_OFF = {
    "rewarmup_steps": 0, "factored_lr_scale": 1, "adapter_lr_scale": 1, "left_lr_scale": 1, "right_lr_scale": 1,
    "frobenius_decay": False,
}  # fmt: skip


def own_rate(optimizer: torch.optim.Optimizer, mine: set[int] | None = None) -> OwnRate | None:
    """How the optimizer computes its learning rate itself, whatever a scheduler says, if it does.

    Args:
        mine: Identities of the parameters whose groups are looked at; None: all.
    """
    rule = OPTIMIZERS.get(qualified_name(type(optimizer)))
    if rule is None or rule.own_rate is None:
        return None
    groups = (g for g in optimizer.param_groups if mine is None or any(id(p) in mine for p in g["params"]))
    return rule.own_rate if any(map(rule.own_rate.when, groups)) else None


def scaling(config: DRTConfig) -> str:
    """The settings that scale the learning rate, as they are given; empty if none is."""
    return ", ".join(f"{key}={value}" for key, off in _OFF.items() if (value := getattr(config, key)) != off)


def check_rate(optimizer: torch.optim.Optimizer, config: DRTConfig, mine: set[int] | None = None) -> None:
    """Whether the settings that scale the learning rate can act.

    Args:
        mine: Identities of the parameters in whose groups they act; None: in all.

    Raises:
        ValueError: They cannot.
    """
    found = scaling(config)
    if found and (rate := own_rate(optimizer, mine)) is not None:
        name = type(optimizer).__name__
        raise ValueError(
            f"{found}: this needs the learning rate of the optimizer's groups, but {name} with {rate.option} "
            f"computes its own and does not read it. Use {name}(params, {rate.instead}), or AdamW; or leave the "
            "setting out."
        )
