"""The optimizer of the package grokadamw, which cannot follow a change of form."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule

OPTIMIZERS.add(
    "grokadamw.grokadamw.GrokAdamW",
    OptimizerRule(
        "GrokAdamW",
        tested="grokadamw 0.1.2",
        optim={"grokadamw": {}},
        refused="its moments stand in its parameter group by weight: they do not come back from a checkpoint, even "
        "without a change of form, and how it averages goes by a weight's place in the group, which new weights shift.",
        nearest="adamw_torch",
    ),
)
