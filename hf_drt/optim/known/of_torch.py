"""The optimizers of torch."""

from hf_drt.optim.registry import OPTIMIZERS, MomentKeys, OptimizerRule

_ADAM = MomentKeys(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq"))

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
    "torch.optim.rmsprop.RMSprop",
    OptimizerRule("torch's RMSprop, whose averages start anew", optim={"rmsprop": {"lr": 1e-3}}),
)
