"""The events of a Trainer's loop, handed to a driver."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_drt.trainer.driver import PhaseDriver

if TYPE_CHECKING:
    from hf_drt.trainer.mixin import DRTTrainerMixin


class DriverEvents(TrainerCallback):
    """Calls the driver of the run in progress."""

    @property
    @abstractmethod
    def driver(self) -> PhaseDriver:
        """That of the run in progress.

        Raises:
            RuntimeError: There is none.
        """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.driver.train_begins(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.driver.step_begins(args, state, kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.driver.step_ends(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.driver.epoch_ends()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.driver.train_ends(state)


class TrainerEvents(DriverEvents):
    """The callback inside a trainer with DRTTrainerMixin, which makes a driver for every run.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: "DRTTrainerMixin"):
        self._trainer = trainer

    @property
    def driver(self) -> PhaseDriver:
        return self._trainer._drt_running()
