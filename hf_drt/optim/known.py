"""The optimizers that may follow a change of form, with what the Trainer passes them."""

from hf_drt.optim.registry import OPTIMIZERS, MomentKeys, OptimizerRule, OwnRate, Shape

_ADAM = MomentKeys(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq"))


def _adafactor_shape(key: str, shape: Shape) -> Shape:
    """Of a matrix it keeps the means of rows and columns."""
    return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}.get(key, shape)


OPTIMIZERS.add("torch.optim.adam.Adam", OptimizerRule("torch's Adam, with or without amsgrad", _ADAM))
OPTIMIZERS.add(
    "torch.optim.adamw.AdamW",
    OptimizerRule(
        "torch's AdamW, the Trainer's default", _ADAM, {"adamw_torch": {}, "adamw_torch_fused": {"fused": True}}
    ),
)
OPTIMIZERS.add("torch.optim.nadam.NAdam", OptimizerRule("torch's NAdam", _ADAM))
OPTIMIZERS.add("torch.optim.radam.RAdam", OptimizerRule("torch's RAdam", _ADAM))
OPTIMIZERS.add(
    "torch.optim.sgd.SGD",
    OptimizerRule("torch's SGD, whose momentum follows", MomentKeys(("momentum_buffer",)), {"sgd": {"lr": 1e-3}}),
)
OPTIMIZERS.add(
    "transformers.optimization.Adafactor",
    OptimizerRule(
        "transformers' Adafactor, whose row and column statistics start anew",
        optim={"adafactor": {"lr": 1e-3, "scale_parameter": False, "relative_step": False}},
        state_shape=_adafactor_shape,
        own_rate=OwnRate(
            lambda group: bool(group.get("relative_step")),
            "relative_step=True",
            "lr=1e-3, relative_step=False, scale_parameter=False",
        ),
    ),
)
OPTIMIZERS.add(
    "torch.optim.rmsprop.RMSprop",
    OptimizerRule("torch's RMSprop, whose averages start anew", optim={"rmsprop": {"lr": 1e-3}}),
)
