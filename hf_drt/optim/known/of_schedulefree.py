"""The schedule-free optimizers of Meta's package schedulefree (Defazio et al. 2024)."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import Group, OptimizerRule

_COUNTS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


def _warm_up_of_the_run(group: Group) -> Group:
    """A new weight does not go through the run's warm-up once more."""
    steps, done = group["warmup_steps"], group["k"]
    return {"lr": group["lr"] * min(1.0, (done + 1) / steps), "warmup_steps": 0} if steps else {}


OPTIMIZERS.add(
    "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    OptimizerRule(
        "schedule-free AdamW: layers change form at their average, which begins anew with the rest",
        tested="schedulefree 1.4.1",
        optim={"schedule_free_adamw": {}},
        counts=_COUNTS,
        late=_warm_up_of_the_run,
        averages=True,
    ),
)
OPTIMIZERS.add(
    "schedulefree.radam_schedulefree.RAdamScheduleFree",
    OptimizerRule(
        "schedule-free RAdam: as schedule-free AdamW; new weights rest for its first four steps",
        tested="schedulefree 1.4.1",
        optim={"schedule_free_radam": {}},
        counts=_COUNTS,
        averages=True,
    ),
)
OPTIMIZERS.add(
    "schedulefree.sgd_schedulefree.SGDScheduleFree",
    OptimizerRule(
        "schedule-free SGD: as schedule-free AdamW",
        tested="schedulefree 1.4.1",
        optim={"schedule_free_sgd": {}},
        counts=_COUNTS,
        late=_warm_up_of_the_run,
        averages=True,
    ),
)
