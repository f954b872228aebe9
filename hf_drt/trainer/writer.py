"""ModelWriter: whatever way a trainer writes its model in, what lands is what was asked for."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_drt.checkpoint import runtime_names
from hf_drt.engines import unwrapped
from hf_drt.export import check_written, marked_state_dict, save_export
from hf_drt.registry import EXPORTERS
from hf_drt.trainer.ema import write_beside, written_average

State = dict[str, Tensor] | None


class ModelWriter:
    """Around the methods by which a trainer writes its model, be they of transformers, of a library or of the user.

    In a checkpoint the model keeps the form of its phase, and its state file is written beside it. What is written for
    the user is in the form of ``drt_export``: for the time of the writing the model itself is presented in that form,
    so that ``save_pretrained`` of a container, or ``torch.save`` of a state dict, finds nothing else. What has landed
    is looked at afterwards.

    Args:
        trainer: Whose model is written.
        export: Gives the form in force.
        state_file: Writes ``drt_state.json`` into a folder.

    Attributes:
        checkpoint: Whether it is a checkpoint that is written now.
    """

    def __init__(self, trainer: Any, export: Callable[[], str], state_file: Callable[[str], None]):
        self._trainer, self._export, self._state_file = trainer, export, state_file
        self.checkpoint = False
        self._inside = False
        self._afterwards: Callable[[], Any] | None = None

    @contextlib.contextmanager
    def writing(self, checkpoint: bool) -> Iterator[None]:
        """What is written in the block: a checkpoint, or the model for its user."""
        outer, self.checkpoint = self.checkpoint, checkpoint
        try:
            yield
        finally:
            self.checkpoint = outer

    def write(self, save: Callable[[str, State], Any], folder: str | None, state: State) -> None:
        """Write by ``save(folder, state)``, a method of the trainer.

        Args:
            save: Takes ``state`` for what it is: None where the method makes its own.
            folder: By default the trainer's ``output_dir``.
            state: The whole model's state dict where it has been gathered already, as under FSDP.

        Raises:
            CheckpointError: What has landed is not what was asked for.
        """
        folder = folder if folder is not None else str(self._trainer.args.output_dir)
        if self._inside:  # a method that calls its base's, or another one of these
            save(folder, self._converted(state))
            return
        self._inside = True
        try:
            (self._checkpoint if self.checkpoint else self._model)(save, folder, state)
        finally:
            self._inside = False
            afterwards, self._afterwards = self._afterwards, None
        if afterwards is not None:
            afterwards()

    def once_written(self, action: Callable[[], Any]) -> None:
        """Do this as soon as the model that is being written is whole."""
        self._afterwards = action

    def _checkpoint(self, save: Callable[[str, State], Any], folder: str, state: State) -> None:
        with runtime_names(self._trainer.model):
            save(folder, self._converted(state))
        if self._trainer.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)  # under FSDP nothing is in it yet
            self._state_file(folder)
            write_beside(self._trainer, folder)

    def _model(self, save: Callable[[str, State], Any], folder: str, state: State) -> None:
        trainer, started = self._trainer, time.time()
        repository, writes = getattr(trainer, "hub_model_id", None), trainer.args.should_save
        model = unwrapped(
            trainer.model
        )  # under FSDP it may be compiled, and a gathered state has the model's own names
        with written_average(trainer):
            written = save_export(model, folder, self._export(), save, state, repository, writes)
            if writes:
                check_written(Path(folder), model, written, started)

    def _converted(self, state: State) -> State:
        """A gathered state dict in the form that is written; converted once, it stays as it is."""
        if not state:
            return state
        model = unwrapped(self._trainer.model)
        return marked_state_dict(model, state) if self.checkpoint else EXPORTERS[self._export()].converted(model, state)
