"""EMACallback: an average of the effective weights of a Trainer's run."""

import contextlib
import logging
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_drt.ema import AVERAGE_NAME, EMA, EMADecay, read_average, write_average
from hf_drt.engines import unwrapped
from hf_drt.export import low_rank_layers

logger = logging.getLogger(__name__)


class EMACallback(TrainerCallback):
    """Averages a run's effective weights (:class:`hf_drt.EMA`), update by update, and through changes of form.

    A checkpoint has the average beside the weights, in ``drt_ema.safetensors``; :class:`hf_drt.DRTTrainer`, with a
    schedule or without, goes on from it to the same bits, and loads that of the best checkpoint. In a plain ``Trainer``
    call :meth:`resume_from` before ``train(resume_from_checkpoint=...)``.

    Args:
        decay, buffers, device: As of :class:`hf_drt.EMA`.
        evaluate: Whether ``evaluate()`` and ``predict()`` use the averaged weights; the best score is one of them
            then. Needs DRTTrainer.
        export: Whether the model that the run gives is the averaged one: the model itself once training is over, and
            under dynamic-rank training what ``save_model()`` and pushes write before. Checkpoints keep the run's own.

    Attributes:
        ema: The average of the run, from its start on; with ``with callback.ema.averaged():`` for whatever else.

    Raises:
        ValueError: As of :class:`hf_drt.EMADecay`.
    """

    def __init__(
        self,
        decay: float | EMADecay = 0.999,
        *,
        buffers: bool = False,
        device: torch.device | str | None = None,
        evaluate: bool = False,
        export: bool = False,
    ):
        self.decay, self.evaluate, self.export = EMADecay.of(decay), evaluate, export
        self.ema: EMA | None = None
        self.served = False  # by a trainer with DRTTrainerMixin
        self._options = {"buffers": buffers, "device": device}
        self._folder: str | None = None
        self._written: tuple[str, int] | None = None
        self._delivered = False

    def resume_from(self, folder: str | Path | None) -> None:
        """The checkpoint whose average the next ``train()`` goes on with; DRTTrainer tells it by itself."""
        self._folder = None if folder is None else str(folder)

    # ---- in the run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(args, state)
        self.ema = EMA(kwargs["model"], self.decay, **self._options)
        self._delivered = False
        if state.global_step:
            self.load(str(self._folder))
        logger.info("the average of the weights takes %.1f MiB", self.ema.nbytes / 2**20)

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.evaluate and not self.served:
            raise ValueError(
                "EMACallback(evaluate=True) needs DRTTrainer or its mixin, with a schedule or without: a callback of a "
                "plain Trainer is not asked before an evaluation. Use one, or evaluate by hand: with "
                "callback.ema.averaged(): trainer.evaluate()."
            )
        if args.load_best_model_at_end and not self.served:
            raise ValueError(
                "load_best_model_at_end loads weights in a plain Trainer without a word to EMACallback, whose average "
                "would be of later ones. Use DRTTrainer, or set load_best_model_at_end=False."
            )
        if state.global_step and self._folder is None:
            raise ValueError(
                f"training goes on at update step {state.global_step}, and a plain Trainer does not tell EMACallback "
                "from which folder. Call callback.resume_from(folder) before train(), or use DRTTrainer."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.average_of(kwargs["model"]).update()

    def average_of(self, model: nn.Module) -> EMA:
        """The average, after a look whether it is one of this model.

        Raises:
            ValueError: It is of another, or there is none.
        """
        if self.ema is None:
            raise ValueError("EMACallback was added after training had begun. Add it before trainer.train().")
        if self.ema.model is not unwrapped(model):
            raise ValueError(
                "the trainer's model is no longer the one that EMACallback has averaged. Take the callback out "
                "(trainer.remove_callback(EMACallback)), or train the new model first."
            )
        return self.ema

    # ---- checkpoints

    def write(self, folder: str, step: int) -> None:
        """Write the average into a checkpoint folder."""
        if self.ema is not None:
            write_average(folder, self.ema)
            self._written = (Path(folder).name, step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Without dynamic-rank training, which has it written before the checkpoint is whole."""
        name, step = f"checkpoint-{state.global_step}", state.global_step
        if args.should_save and self._written != (name, step):
            self.write(f"{args.output_dir}/{name}", step)

    def load(self, folder: str) -> None:
        """Go on with the average in a checkpoint folder.

        Raises:
            CheckpointError: There is none.
            ValueError: It is of another model.
        """
        if self.ema is None:
            return
        state = read_average(folder)
        if state["decay"] != asdict(self.decay):
            logger.warning("the average in %s had %s so far, and goes on with %s.", folder, state["decay"], self.decay)
        self.ema.load_state_dict(state)

    # ---- what becomes of it

    def evaluated(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A block for an evaluation."""
        asked = self.evaluate and self.ema is not None
        return self.average_of(model).averaged() if asked else contextlib.nullcontext()

    def written(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A block in which the model is written for its user."""
        asked = self.export and self.ema is not None and not self._delivered
        return self.average_of(model).averaged() if asked else contextlib.nullcontext()

    def deliver(self, model: nn.Module) -> None:
        """Make the model itself the averaged one, where it is dense."""
        if not self.export or self.ema is None or self._delivered:
            return
        if any(True for _ in low_rank_layers(model)):
            logger.warning(
                "the model keeps its own weights, since it is of low rank still and the average is dense. Under "
                "DRTTrainer save_model() writes the average all the same; else: with callback.ema.averaged(): "
                "model.save_pretrained(folder), or callback.ema.copy_to(truncate=True)."
            )
            return
        self.average_of(model).copy_to()
        self._delivered = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.deliver(kwargs["model"])


def ema_callback(trainer: Any) -> EMACallback | None:
    """That of a trainer."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, EMACallback)), None)


def write_beside(trainer: Any, folder: str) -> None:
    """The average, if there is one, beside the weights of a checkpoint that is being written."""
    if (callback := ema_callback(trainer)) is not None:
        callback.write(folder, trainer.state.global_step)


def deliver_average(trainer: Any) -> None:
    """At the end of training, before anybody else looks at the model."""
    if (callback := ema_callback(trainer)) is not None:
        callback.deliver(trainer.model)


def written_average(trainer: Any) -> AbstractContextManager[Any]:
    """A block in which a trainer writes its model for its user."""
    callback = ema_callback(trainer)
    return contextlib.nullcontext() if callback is None else callback.written(trainer.model)


def warn_of_lost_average(folder: str) -> None:
    """A run goes on without the average of the checkpoint's."""
    if Path(folder, AVERAGE_NAME).is_file():
        logger.warning("%s has an average of its weights, and this run has no EMACallback: it ends here.", folder)
