"""Publishing: the overrides of ``transformers.Trainer`` that send a model to the Hub.

- ``_push_from_checkpoint``, ``_finish_current_push``: what is published loads, and is pushed again where that failed.
- ``create_model_card``: the card says how the model was trained and how to load it.
- ``push_to_hub``: a model that an earlier push has left there in another form goes.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer_utils import HubStrategy

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.engines import engine_of
from hf_drt.export import complete_card, renew_card
from hf_drt.trainer.base import TrainerBase
from hf_drt.trainer.push import Publisher, in_progress, phase_tag
from hf_drt.trainer.saving import finish
from hf_drt.trainer.summary import run_summary
from hf_drt.trainer.writer import ModelWriter


class PublishingMixin(TrainerBase):
    """The part of :class:`hf_drt.DRTTrainerMixin` that publishes; without DRT everything is the base's."""

    drt: DynamicRank | None = None
    _drt_settings: DRTConfig | None = None  # of the latest run, before it those of the making; None while DRT is off
    _drt_publisher: Publisher
    _drt_writer: ModelWriter
    _drt_state: dict[str, Tensor] | None = None  # of a sharded model, while it is published
    _drt_config: Callable[[], DRTConfig]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._drt_settings is None or self.drt is None:
            return super()._push_from_checkpoint(checkpoint_folder)
        if self.args.hub_strategy == HubStrategy.END:
            return
        step = self.state.global_step
        tag = phase_tag(self.drt.plan, step) if self._drt_settings.tag_phases else None
        due = self.is_world_process_zero() and self._drt_push_is_due(tag)
        with self._drt_gathered(due):
            if not due:
                return
            finish(Path(checkpoint_folder))  # a mark is not uploaded
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.push_in_progress = self._drt_publisher.push(self.hub_model_id, checkpoint_folder, step, tag)

    def _drt_push_is_due(self, tag: str | None) -> bool:
        """Whether what is pushed now waits for a push in progress, or there is none; else it is passed over."""
        if self.push_in_progress is None or self.push_in_progress.is_done():
            return True
        if tag is None and not self.control.should_training_stop and not self.args.hub_always_push:
            return False
        self.push_in_progress.wait_until_done()  # what it uploads is about to be written anew
        return True

    @contextlib.contextmanager
    def _drt_gathered(self, due: bool) -> Iterator[None]:
        """In the block the process that pushes has the state of a sharded model, which all have a part in gathering:
        whether it is ``due`` on the first one decides."""
        if engine_of(self.model).sharded and broadcast_object_list([due])[0]:
            self._drt_state = self.accelerator.get_state_dict(self.model)
        try:
            yield
        finally:
            self._drt_state = None

    def _drt_publish(self, folder: str) -> None:
        """The model as it is published, with its card, from inside the writing of a checkpoint."""
        with self._drt_writer.writing(False):
            self._save(folder, **({} if self._drt_state is None else {"state_dict": self._drt_state}))
        self.create_model_card(model_name=self.hub_model_id.rpartition("/")[2])

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self._drt_settings is not None and getattr(self, "hub_model_id", None) and self.is_world_process_zero():
            self._drt_publisher.finish(self.hub_model_id)

    def _drt_wait_for_push(self) -> None:
        """A push in progress may still read what is about to be written over."""
        super()._finish_current_push()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The base's card, with how the model was trained in changing rank and how to load it."""
        drt, folder = self.drt if self.is_world_process_zero() else None, str(self.args.output_dir)
        if drt is not None:
            renew_card(folder)
        super().create_model_card(*args, **kwargs)
        if drt is not None:
            repository = getattr(self, "hub_model_id", None) or folder
            complete_card(folder, run_summary(drt, self.state.log_history, self._drt_config().export, repository))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The base's; a model that an earlier push has left there in another form is deleted afterwards."""
        commit = super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        if self._drt_settings is not None and self.is_world_process_zero():
            clear = partial(self._drt_publisher.clear, self.hub_model_id, revision or self.args.hub_revision, token)
            if isinstance(commit, Future):
                self.push_in_progress = in_progress(commit)
                commit.add_done_callback(lambda upload: upload.exception() or clear())
            else:
                clear()
        return commit
