"""The optimizer of transformers."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule, OwnRate, Shape

RELATIVE_STEP = OwnRate(
    lambda group: bool(group.get("relative_step")),
    "relative_step=True",
    "lr=1e-3, relative_step=False, scale_parameter=False",
)


def _adafactor_shape(key: str, shape: Shape) -> Shape:
    """Of a matrix it keeps the means of rows and columns."""
    return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}.get(key, shape)


OPTIMIZERS.add(
    "transformers.optimization.Adafactor",
    OptimizerRule(
        "transformers' Adafactor, whose row and column statistics start anew",
        optim={"adafactor": {"lr": 1e-3, "scale_parameter": False, "relative_step": False}},
        tested="transformers 5.24",
        state_shape=_adafactor_shape,
        own_rate=RELATIVE_STEP,
    ),
)
