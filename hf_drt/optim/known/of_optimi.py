"""The optimizer of torch-optimi that the Trainer knows.

Its groups count the steps for all their weights, also while they are empty, so that all counts are the same. Moments
that follow fit that count. Those that begin anew late in a run make updates of ``1 - beta1^t`` times the rate at first,
t counted from the switch: the size of each is clipped by the second moment, which is as new.
"""

from typing import Any

import torch
from torch import nn

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import MomentKeys, OptimizerRule, State


def _begun(optimizer: Any, weight: nn.Parameter) -> State:
    """All of its entries, with those for the rounding errors of half precision: where one stands, it makes none."""
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    state: State = {}
    if group["setup"]:
        optimizer._init_state(group, state, weight)
    return state


def _released(optimizer: torch.optim.Optimizer) -> str:
    if any(group.get("gradient_release") for group in optimizer.param_groups):
        return "with gradient_release=True hooks on the old weights make its steps. Use gradient_release=False."
    return ""


OPTIMIZERS.add(
    "optimi.stableadamw.StableAdamW",
    OptimizerRule(
        "torch-optimi's StableAdamW; weights whose moments begin anew ramp up over some 1 / (1 - beta1) steps",
        MomentKeys(("exp_avg",), ("exp_avg_sq",)),
        {"stable_adamw": {"lr": 1e-3, "max_lr": None, "decouple_lr": False, "kahan_sum": None}},
        unfit=_released,
        tested="torch-optimi 0.3.3",
        new_state=_begun,
    ),
)
