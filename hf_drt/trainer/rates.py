"""The learning rates of a trainer's runs: as they are expected before there is an optimizer, and as they are.

A run's first phase has to be in force before the optimizer is made over its parameters, but the optimizer may have any
learning rate: one that was passed, ``optimizer_cls_and_kwargs``, an overridden ``create_optimizer``.
"""

import logging
from typing import Any

from transformers.training_args import OptimizerNames

from hf_drt.checkpoint import CheckpointError
from hf_drt.controller import DynamicRank
from hf_drt.planning import Resolution, ResolvedPlan
from hf_drt.trainer.lr import Curve, Groups, StandIn, existing_curve, group_options, is_fused, stepped, twin, untouched
from hf_drt.trainer.refusals import refuse_anchors_with_scaler

logger = logging.getLogger(__name__)

_OWN = ("transformers.", "hf_drt.")


class RunRates:
    """The learning rates of one trainer's runs.

    It remembers where the last run began, since a run that is resumed in the same trainer finds its optimizer, and a
    scheduler that was passed, at the end of the run before.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._groups: Groups | None = None
        self._expected: Curve | None = None
        self._passed: tuple[Any, Any] | None = None  # the scheduler, and its twin from where the run began

    def first_plan(self, resolution: Resolution, resumed: bool) -> ResolvedPlan:
        """The plan as far as it is known before there is an optimizer: it may be an outline only.

        Raises:
            ValueError: The schedule does not resolve.
        """
        if not resolution.schedule.uses_lr:
            return resolution.plan(lambda: None)
        self._refuse_scaler(resolution)
        curve = self._expected = self.expected(resolution.run.max_steps, resumed)
        return resolution.plan(curve) if curve is not None else resolution.outline()

    def settle(self, controller: DynamicRank, resolution: Resolution, checkpoint: str | None = None) -> None:
        """Resolve the plan by the run's own scheduler, which has been made and not been stepped yet.

        A resumed run whose plan was known before has found its checkpoint's to be the same; its scheduler is made over
        an optimizer that may have trained already, and says nothing of the run's beginning.

        Raises:
            ValueError: The schedule does not resolve.
            CheckpointError: The checkpoint's plan is another.
        """
        if not resolution.schedule.uses_lr or (checkpoint is not None and not controller.resolved.outline):
            return
        self._refuse_scaler(resolution)
        rates = self.actual(resolution.run.max_steps)()
        if not controller.resolved.outline and self._expected is not None and self._expected() == rates:
            return
        plan = resolution.plan(lambda: rates)
        try:
            controller.settle(plan, resumed=checkpoint is not None)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from None

    def expected(self, max_steps: int, resumed: bool) -> Curve | None:
        """The curve of the run that is about to begin; None where only its own scheduler will tell.

        Nothing of the trainer changes. That a scheduler cannot be made or stepped over a stand-in is no error here.
        """
        stand_in = self._stand_in(resumed)
        if stand_in is None:
            return None
        try:
            scheduler = self._made_over(stand_in, max_steps)
            if scheduler is self._trainer.lr_scheduler:
                scheduler = self._beginning(scheduler, resumed)
            elif getattr(scheduler, "optimizer", None) is not stand_in:
                return None
            rates = stepped(scheduler, max_steps)
        except Exception as error:  # of any kind: create_scheduler may be the user's own
            logger.info(
                "the learning rate will be read off the run's own scheduler: %s: %s", type(error).__name__, error
            )
            return None
        return lambda: rates

    def actual(self, max_steps: int) -> Curve:
        """The curve of the trainer's scheduler, which stands at the beginning of the run."""
        if self._groups is None:
            self._groups = group_options(self._trainer.optimizer)
            for group in self._groups:  # the scheduler has set the first step's rate already
                group["lr"] = group.pop("initial_lr", group["lr"])
        return existing_curve(self._trainer.lr_scheduler, max_steps)

    def _refuse_scaler(self, resolution: Resolution) -> None:
        trainer = self._trainer
        if trainer.optimizer is not None:
            refuse_anchors_with_scaler(resolution.schedule, trainer.accelerator.scaler, is_fused(trainer.optimizer))
        elif not makes_its_optimizer(trainer):
            fused = trainer.args.optim == OptimizerNames.ADAMW_TORCH_FUSED
            refuse_anchors_with_scaler(resolution.schedule, trainer.accelerator.scaler, fused)

    def _stand_in(self, resumed: bool) -> StandIn | None:
        """An optimizer with the options that the run's has, or will have, as its scheduler is made."""
        optimizer = self._trainer.optimizer
        if optimizer is not None:
            if self._groups is None or not resumed:
                self._groups = group_options(optimizer)
            return StandIn(self._groups, optimizer.defaults)
        self._groups = None
        if makes_its_optimizer(self._trainer):
            return None
        rate = {"lr": self._trainer.args.learning_rate}
        return StandIn([rate, rate], rate | {"betas": (0.9, 0.999)})  # with and without weight decay

    def _made_over(self, stand_in: StandIn, max_steps: int) -> Any:
        """What the trainer would use as its scheduler if the stand-in were its optimizer."""
        trainer = self._trainer
        attributes = dict(vars(trainer))
        with untouched(trainer.optimizer):
            try:
                trainer.optimizer = stand_in  # an override may build over it, and take no optimizer as an argument
                if trainer._created_lr_scheduler:
                    trainer.lr_scheduler = None
                trainer.create_scheduler(num_training_steps=max_steps)
                return trainer.lr_scheduler
            finally:
                for name in set(vars(trainer)) - set(attributes):
                    delattr(trainer, name)
                vars(trainer).update(attributes)

    def _beginning(self, scheduler: Any, resumed: bool) -> Any:
        """A copy of a scheduler that was passed, from where the run has begun or begins."""
        if not resumed or self._passed is None or self._passed[0] is not scheduler:
            self._passed = (scheduler, twin(scheduler))
        return twin(self._passed[1])


def makes_its_optimizer(trainer: Any) -> bool:
    """Whether the optimizer is made by other settings than the Trainer's arguments, and may have any rate."""
    if trainer.optimizer_cls_and_kwargs is not None:
        return True
    others = (cls for cls in type(trainer).__mro__ if not cls.__module__.startswith(_OWN))
    names = {"create_optimizer", "get_optimizer_cls_and_kwargs"}
    return any(names & set(vars(holder)) for holder in (trainer, *others))
