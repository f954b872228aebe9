"""``enable_jit_checkpoint``: a checkpoint on SIGTERM from which the run goes on bitwise, on any number of processes.

transformers saves at the first event after the signal. Before an optimizer step the random generators have moved on
with the forward pass that a resumed run repeats; at the first step of an epoch with the data loader's start; and
several processes see the signal at different steps, so that some wait for ever for those that have stopped.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class JITCheckpoint(TrainerCallback):
    """Saves at the end of the update step in which any process has got SIGTERM, and ends training.

    An evaluation that is due moves the random generators on, and can outlast what time is left: it comes after the
    checkpoint, which is then written again. The best model is not loaded, since the run is to go on; with
    ``save_total_limit=1`` the checkpoint would be deleted too.

    Args:
        original: The callback of transformers, whose signal handler it uses.
        trainer: The trainer that saves.
    """

    def __init__(self, original: JITCheckpointCallback, trainer: Any):
        self.original, self.trainer = original, trainer
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopping = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._requested():
            self._stopping = control.should_training_stop = control.should_save = True
            if control.should_evaluate:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def _requested(self) -> bool:
        manager: Any = self.original.jit_manager  # made when training began
        accelerator = self.trainer.accelerator
        requested = manager.is_checkpoint_requested
        if accelerator.num_processes > 1:
            if requested:
                accelerator.set_trigger()
            requested = accelerator.check_trigger()
        if requested:
            manager.is_checkpoint_requested = False
        return requested

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stopping:  # the Trainer takes it for the end of an epoch wherever training stops
            control.should_evaluate &= float(state.epoch).is_integer()
            control.should_save = control.should_evaluate
            state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stopping:
            state.best_model_checkpoint = None  # in memory only

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.original.on_train_end(args, state, control, **kwargs)


def save_at_step_end(trainer: Any) -> None:
    """Let :class:`JITCheckpoint` take the place of transformers' callback, where there is one."""
    original = trainer.pop_callback(JITCheckpointCallback)
    if original is not None:
        trainer.add_callback(JITCheckpoint(original, trainer))
