"""The learning rate that a plain Trainer logs for every update step, and where a schedule begins on it."""

import tiny
from transformers import Trainer, TrainerCallback

STEPS = 12
SHORT = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
}


class Options(TrainerCallback):
    """What the optimizer's groups hold in each update, but rules of ours."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        keys = ("lr", "momentum", "betas", "initial_lr", "max_lr")
        self.seen.append([{key: str(group[key]) for key in keys if key in group} for group in optimizer.param_groups])


def logged(trainer) -> list[float]:
    """The learning rates of the last run's updates, as the Trainer wrote them."""
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def first_below(curve: list[float], share: float) -> int | None:
    """The first update after the peak whose rate is below a share of it."""
    top = curve.index(max(curve))
    return next((k for k in range(top + 1, len(curve)) if curve[k] < share * max(curve)), None)


def first_above(curve: list[float], share: float) -> int | None:
    return next((k for k, lr in enumerate(curve) if lr > share * max(curve)), None)


def plain_trainer(folder, cls=Trainer, model=None, optimizers=(None, None), callbacks=None, more=None, **changes):
    """A plain Trainer with the arguments of :func:`drt_trainer`."""
    return _trainer(cls, folder, model, optimizers, callbacks, more, drt_schedule=None, **changes)


def drt_trainer(folder, cls, model=None, optimizers=(None, None), callbacks=None, more=None, **changes):
    """A trainer whose model stays in the form of the last phase."""
    native = {} if changes.get("drt_schedule", True) is None else {"drt_export": "native"}
    return _trainer(cls, folder, model, optimizers, callbacks, more, **native, **changes)


def _trainer(cls, folder, model, optimizers, callbacks, more, **changes):
    args = tiny.arguments(folder, **{**SHORT, **changes})
    model, data = model if model is not None else tiny.llama(), tiny.dataset()
    return cls(
        model=model, args=args, train_dataset=data, eval_dataset=data, optimizers=optimizers, callbacks=callbacks,
        **(more or {}),
    )  # fmt: skip


def starts(trainer) -> list[int]:
    """The update steps at which the phases of a run began, by its plan."""
    return [phase.start for phase in trainer.drt.plan.phases]


def switches(trainer) -> list[int]:
    """The update steps at which the phases of a run began, by its log."""
    return [row["step"] for row in trainer.state.log_history if "drt_switch_seconds" in row]
