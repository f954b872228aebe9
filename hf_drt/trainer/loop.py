"""Loop: what a :class:`hf_drt.trainer.driver.PhaseDriver` may ask of the training loop that it is driven by."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hf_drt.trainer.aside import metrics_set_aside
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.probe import Probe

if TYPE_CHECKING:
    from hf_drt.trainer.mixin import DRTTrainerMixin

Log = Callable[[dict[str, float]], None]


class Loop(ABC):
    """A training loop, as far as a driver depends on it.

    Attributes:
        probe: Gives the model's output on a batch that is about to be trained on, or None; None if there is no way.
    """

    probe: Callable[[], Tensor | None] | None = None

    def around_switch(self) -> AbstractContextManager:
        """Around a change of form of the model."""
        return nullcontext()

    def step_loss(self) -> Tensor | None:
        """The loss of the update step that ends, if it is seen."""
        return None

    @abstractmethod
    def count(self, meter: PhaseMeter, args: TrainingArguments) -> None:
        """Add the samples and tokens of the update step that begins."""

    @abstractmethod
    def log(self, state: TrainerState, row: dict[str, Any]) -> None:
        """Report a row of metrics."""


class PlainLoop(Loop):
    """That of a plain ``Trainer``, of which a callback sees no batch and no loss.

    Args:
        sink: Receives the rows; without it they go to ``state.log_history``.

    Attributes:
        switched: Called after each change of form; may be assigned.
    """

    def __init__(self, sink: Log | None = None):
        self.sink = sink
        self.switched: Callable[[], None] | None = None

    @contextmanager
    def around_switch(self) -> Iterator[None]:
        yield
        if self.switched is not None:
            self.switched()

    def count(self, meter: PhaseMeter, args: TrainingArguments) -> None:
        """As many samples as the arguments promise."""
        meter.samples += args.train_batch_size * args.gradient_accumulation_steps

    def log(self, state: TrainerState, row: dict[str, Any]) -> None:
        if self.sink is not None:
            self.sink(row)
        else:
            state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})


class TrainerLoop(Loop):
    """That of a trainer whose overrides tell it of batches and losses.

    Args:
        trainer: Whose loop it is.
    """

    def __init__(self, trainer: "DRTTrainerMixin"):
        self._trainer = trainer
        self.probe: Probe = Probe(trainer)
        self._batches: list[Any] = []
        self._loss: Tensor | float = 0.0

    def restart(self) -> None:
        """A run begins, be it that an earlier one was interrupted within an update step."""
        self._loss = 0.0

    def saw_batches(self, batches: list[Any]) -> None:
        """These are the batches of the update step that begins."""
        if batches:
            self.probe.batch, self._batches = batches[0], batches

    def saw_loss(self, loss: Tensor) -> None:
        """That of one batch, divided by the number of those of the update step."""
        self._loss = self._loss + loss.detach()

    def step_loss(self) -> Tensor | None:
        """The sum of what was seen since the last step, alike on all processes."""
        loss, self._loss = torch.as_tensor(self._loss, device=self._trainer.args.device), 0.0
        reduced: Any = self._trainer.accelerator.reduce(loss, "mean")  # one tensor, as what was given
        return reduced

    def around_switch(self) -> AbstractContextManager:
        return self._trainer._drt_around_switch()

    def count(self, meter: PhaseMeter, args: TrainingArguments) -> None:
        meter.count(self._batches, args.world_size)

    def log(self, state: TrainerState, row: dict[str, Any]) -> None:
        with metrics_set_aside(self._trainer):
            self._trainer.log(row)
