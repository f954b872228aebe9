"""Is a group's ``lr`` the rate that the optimizer applies? Rules that scale it would do nothing."""

from typing import Any

import torch

from hf_drt.config import DRTConfig

_OFF = {"rewarmup_steps": 0, "factored_lr_scale": 1, "adapter_lr_scale": 1, "frobenius_decay": False}


def has_own_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer computes its learning rate itself, whatever a scheduler says: Adafactor of transformers
    with relative_step=True. The others that are supported apply that of the group."""
    return any(_relative(group) for group in optimizer.param_groups)


def check_rate(optimizer: torch.optim.Optimizer, config: DRTConfig, mine: set[int] | None = None) -> None:
    """Whether the settings that scale the learning rate can act.

    Args:
        mine: Identities of the parameters in whose groups they act; None: in all.

    Raises:
        ValueError: They cannot.
    """
    found = ", ".join(f"{key}={value}" for key, off in _OFF.items() if (value := getattr(config, key)) != off)
    groups = (g for g in optimizer.param_groups if mine is None or any(id(p) in mine for p in g["params"]))
    if found and any(map(_relative, groups)):
        raise ValueError(
            f"{found}: this needs the learning rate of the optimizer's groups, but Adafactor with relative_step=True "
            "computes its own and does not read it. Use Adafactor(params, lr=1e-3, relative_step=False, "
            "scale_parameter=False), or AdamW; or leave the setting out."
        )


def _relative(group: dict[str, Any]) -> bool:
    return bool(group.get("relative_step"))
