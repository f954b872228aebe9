"""The optimizers of lomo-optim, which update the weights within the backward pass (Lv et al. 2023)."""

from typing import Any

from torch import nn

from hf_drt.forms import accept
from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule, State

accept(gradient_hooks=("lomo_optim.",))


def _hooked(optimizer: Any, weight: nn.Parameter) -> State:
    """The constructor hangs a hook on each weight, which frees gradients during the backward pass."""
    weight.register_hook(optimizer.grad_func)
    return {}


OPTIMIZERS.add(
    "lomo_optim.lomo.Lomo",
    OptimizerRule(
        "LOMO, SGD within the backward pass; it has no state",
        tested="lomo-optim 0.1.1",
        optim={"lomo": {}},
        new_state=_hooked,
        without_step="within the backward pass",
        nearest="sgd",
    ),
)
OPTIMIZERS.add(
    "lomo_optim.adalomo.AdaLomo",
    OptimizerRule(
        "AdaLomo",
        tested="lomo-optim 0.1.1",
        optim={"adalomo": {}},
        refused="its averages stand outside of its state, by names of parameters that its constructor has seen: a new "
        "weight has none, and a checkpoint holds none.",
        nearest="adafactor",
    ),
)
