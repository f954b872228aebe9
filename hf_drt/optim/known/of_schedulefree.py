"""The schedule-free optimizers of Meta's package schedulefree (Defazio et al. 2024)."""

from typing import Any

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import Group, OptimizerRule

_COUNTS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


def _warm_up_of_the_run(group: Group) -> Group:
    """A new weight does not go through the run's warm-up once more."""
    steps, done = group["warmup_steps"], group["k"]
    return {"lr": group["lr"] * min(1.0, (done + 1) / steps), "warmup_steps": 0} if steps else {}


def _add(name: str, optim: str, what: str, **more: Any) -> None:
    rule = OptimizerRule(what, tested="schedulefree 1.4.1", optim={optim: {}}, counts=_COUNTS, averages=True, **more)
    OPTIMIZERS.add(f"schedulefree.{name.lower()}_schedulefree.{name}ScheduleFree", rule)


_add(
    "AdamW",
    "schedule_free_adamw",
    "schedule-free AdamW: layers change form at their average, which begins anew with the rest",
    late=_warm_up_of_the_run,
)
_add(
    "RAdam",
    "schedule_free_radam",
    "schedule-free RAdam: as schedule-free AdamW; new weights rest for its first four steps",
)
_add("SGD", "schedule_free_sgd", "schedule-free SGD: as schedule-free AdamW", late=_warm_up_of_the_run)
