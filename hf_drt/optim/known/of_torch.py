"""The optimizers of torch."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import MomentKeys, OptimizerRule, Shape

_ADAM = MomentKeys(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq"))
_MOMENTUM = MomentKeys(("momentum_buffer",))
_TESTED = "torch 2.13.0"


def _adafactor_shape(key: str, shape: Shape) -> Shape:
    """Of a matrix it keeps the means of rows and columns."""
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}.get(key, shape)


OPTIMIZERS.add("torch.optim.adam.Adam", OptimizerRule("torch's Adam, with or without amsgrad", _ADAM, tested=_TESTED))
OPTIMIZERS.add(
    "torch.optim.adamw.AdamW",
    OptimizerRule(
        "torch's AdamW, the Trainer's default",
        _ADAM,
        {"adamw_torch": {}, "adamw_torch_fused": {"fused": True}},
        tested=_TESTED,
    ),
)
OPTIMIZERS.add(
    "torch.optim.nadam.NAdam",
    OptimizerRule("torch's NAdam", _ADAM, tested=_TESTED, sought=("step", "mu_product")),
)
OPTIMIZERS.add("torch.optim.radam.RAdam", OptimizerRule("torch's RAdam", _ADAM, tested=_TESTED))
OPTIMIZERS.add(
    "torch.optim.sgd.SGD",
    OptimizerRule("torch's SGD, whose momentum follows", _MOMENTUM, {"sgd": {"lr": 1e-3}}, tested=_TESTED),
)
OPTIMIZERS.add(
    "torch.optim.rmsprop.RMSprop",
    OptimizerRule("torch's RMSprop, whose averages start anew", optim={"rmsprop": {"lr": 1e-3}}, tested=_TESTED),
)
OPTIMIZERS.add(
    "torch.optim.adagrad.Adagrad",
    OptimizerRule(
        "torch's Adagrad, whose sums of squares follow as second moments do",
        MomentKeys(second=("sum",)),
        {"adagrad": {}},
        tested=_TESTED,
    ),
)
OPTIMIZERS.add(
    "torch.optim.Muon",
    OptimizerRule(
        "torch's Muon, for matrices alone; adjust_lr_fn='match_rms_adamw' gives U and V one rate",
        _MOMENTUM,
        matrices_alone=True,
        tested=_TESTED,
    ),
)
OPTIMIZERS.add(
    "torch.optim.Adafactor",
    OptimizerRule(
        "torch's Adafactor, whose row and column statistics start anew", state_shape=_adafactor_shape, tested=_TESTED
    ),
)
OPTIMIZERS.add("torch.optim.adamax.Adamax", OptimizerRule("torch's Adamax, whose state starts anew", tested=_TESTED))
OPTIMIZERS.add(
    "torch.optim.adadelta.Adadelta", OptimizerRule("torch's Adadelta, whose state starts anew", tested=_TESTED)
)
OPTIMIZERS.add(
    "torch.optim.asgd.ASGD",
    OptimizerRule("torch's ASGD, whose averages of weights start anew", tested=_TESTED, sought=("step", "eta", "mu")),
)
