"""DRTTrainerMixin: overrides of methods of ``transformers.Trainer``; nothing else but trainer/publishing.py has any.

What each override is for:

- ``_prepare_for_training``: resolves the plan and applies the first phase, once max_steps is known and before the
  optimizer is made.
- ``create_optimizer``: form groups and step hooks, before the scheduler is made.
- ``get_batch_samples``: sees the batches; counts them, and keeps one as the probe of a switch.
- ``training_step``: sees the losses, for full-rank windows that a trigger begins.
- ``_save_checkpoint``, ``_save``: checkpoints keep their form and get ``drt_state.json``; models saved by the user
  are what drt_export says. A save that fails leaves no unfinished files, and a checkpoint that it was to replace.
- ``_save_rng_state``: every process has written its own before ``trainer_state.json`` says that the checkpoint is
  whole, and before older ones are deleted.
- ``train``: resume_from_checkpoint=True means the last complete checkpoint.
- ``save_model``, ``_save_optimizer_and_scheduler``: what FSDP's sharded checkpoints leave out.
- ``_load_from_checkpoint``, ``_load_best_model``: structure before weights, since the Trainer loads non-strictly.
- ``_issue_warnings_after_load``: a missing key of ours is an error, no warning.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.ddp import renewed_reducer
from hf_drt.export import marked_state_dict
from hf_drt.optim import form_group_options, remembered
from hf_drt.pretrained import resolved_plan
from hf_drt.schedule import Run, Schedule
from hf_drt.selection import find_targets
from hf_drt.sharding import is_sharded
from hf_drt.state import STATE_NAME, CheckpointError, read_state
from hf_drt.trainer.arguments import PREFIX
from hf_drt.trainer.aside import metrics_set_aside, runtime_names, untouched_rng, upcast_bases
from hf_drt.trainer.callback import DRTCallback, updates_per_epoch
from hf_drt.trainer.checkpoint import (
    check_optimizer,
    checked_state,
    last_complete_checkpoint,
    stored_batch_size,
)
from hf_drt.trainer.exporting import check_export, hidden_token, save_export
from hf_drt.trainer.jit import save_at_step_end
from hf_drt.trainer.lr import existing_curve, simulated_curve
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.probe import Probe
from hf_drt.trainer.publishing import PublishingMixin
from hf_drt.trainer.push import Publisher
from hf_drt.trainer.refusals import refuse_unsupported
from hf_drt.trainer.saving import recover, written_whole

# The seams and their parameters; tests/unit/test_seams.py fails first if transformers moves one.
# fmt: off
SEAMS: dict[str, tuple[str, ...]] = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "create_optimizer": ("model",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "save_model": ("output_dir", "_internal_call"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_finish_current_push": (),
    "push_to_hub": ("commit_message", "blocking", "token", "revision", "private", "kwargs"),
    "create_model_card": (
        "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset",
        "dataset_args",
    ),
    "_save_rng_state": ("output_dir",),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_issue_warnings_after_load": ("load_result",),
    "set_initial_training_values": ("args", "dataloader"),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "_prepare_inputs": ("inputs",),  # used by probe.py
    "compute_loss_context_manager": (),  # used by probe.py
}
# fmt: on


class DRTTrainerMixin(PublishingMixin):
    """Dynamic-rank training for any subclass of ``Trainer``: ``class MyTrainer(DRTTrainerMixin, SomeTrainer)``.

    Settings come from ``drt=`` (a :class:`hf_drt.DRTConfig` or a schedule's text), else from ``drt_*`` fields of the
    training arguments. Without a schedule the trainer behaves exactly like its base.

    ``save_model()`` writes what ``drt_export`` says, by default a dense model; checkpoints keep their phase's form.

    Attributes:
        drt: The controller, from the start of training on; None while DRT is off.

    Raises:
        ValueError: The configuration is invalid, selects no layer, or meets an engine that is not supported.
    """

    drt: DynamicRank | None = None
    # Settings of every trainer that brings none of its own; ``python -m hf_drt.run`` sets it.
    _drt_default: Callable[[], DRTConfig] | None = None
    _drt_callback: DRTCallback | None = None
    _drt_given: DRTConfig | str | None = None
    _drt_in_checkpoint = False
    _drt_losses: torch.Tensor | float = 0.0

    def __init__(self, *args: Any, drt: DRTConfig | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._drt_given = drt
        config = self._drt_config()
        self._drt_refuse_callbacks()
        if config.schedule is None:
            return
        callback = DRTCallback(config, log=self._drt_log)
        callback.in_drt_trainer = True
        refuse_unsupported(self, config)
        find_targets(self.model, config.include, config.exclude)
        self._drt_probe = Probe(self)
        callback.probe = self._drt_probe
        callback.around_switch = self._drt_around_switch
        callback.step_loss = self._drt_step_loss
        self._drt_publisher = Publisher(self.args, self._drt_publish)
        if self.args.push_to_hub and self.is_world_process_zero():
            self._drt_publisher.make_branch(self.hub_model_id)
        self.add_callback(callback)
        self._drt_callback = callback
        save_at_step_end(self)

    def _drt_refuse_callbacks(self) -> None:
        others = (callback for callback in self.callback_handler.callbacks if callback is not self._drt_callback)
        if any(isinstance(callback, DRTCallback) for callback in others):
            raise ValueError("DRTCallback is part of this trainer. Pass its settings as drt=, or as drt_* arguments.")

    def _drt_config(self) -> DRTConfig:
        """The settings in force: the trainer's own, or those of ``hf_drt.run``; never a mixture.

        Raises:
            ValueError: There are both.
        """
        own = self._drt_own_config()
        if self._drt_default is None:
            return own
        if own != DRTConfig():
            raise ValueError(
                f"this {type(self).__name__} has dynamic-rank settings of its own (schedule={own.schedule!r}), and "
                "hf_drt.run was given others. Run the script without hf_drt.run, or take its settings out."
            )
        return self._drt_default()

    def _drt_own_config(self) -> DRTConfig:
        """``drt=``, over the arguments as they are now: a hyperparameter search changes them between runs."""
        if self._drt_given is None or isinstance(self._drt_given, str):
            text = {} if self._drt_given is None else {"schedule": self._drt_given}
            return DRTConfig.from_prefixed(self.args, PREFIX, **text)
        return DRTConfig.of(self._drt_given)

    def _drt_log(self, row: dict[str, float]) -> None:
        with metrics_set_aside(self):
            self.log(row)

    # ---- the plan, and the model in its first phase

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._drt_refuse_callbacks()
        if self._drt_callback is not None:
            self._drt_losses = 0.0  # of an update that an interrupted run has not finished
            controller = self._drt_controller(max_steps, train_dataloader, resume_from_checkpoint is not None)
            if resume_from_checkpoint is not None and self.is_fsdp_enabled:
                self._drt_restore_before_sharding(resume_from_checkpoint, controller)
            elif resume_from_checkpoint is None:
                with self._drt_around_switch():  # a second train() finds its model wrapped
                    self._drt_callback.first_transition = controller.apply(self.state.global_step, self.optimizer)
                self._drt_callback.meter = PhaseMeter()
            if self.is_fsdp_enabled and self.args.mixed_precision != "no" and not is_sharded(self.model):
                upcast_bases(self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _drt_restore_before_sharding(self, folder: str, controller: DynamicRank) -> None:
        """FSDP loads weights and optimizer after both have been sharded, and so after the structure has to be there."""
        state = checked_state(folder, controller, for_resume=True, fsdp=True)
        controller.load_state_dict(state, self.optimizer)
        self._drt_callback.meter.load_state_dict(state.get("meter", {}))

    def _drt_controller(self, max_steps: int, train_dataloader: Any, resumed: bool) -> DynamicRank:
        """The controller of this model and run: the present one if it fits, else a new one."""
        callback = self._drt_callback
        config = self._drt_config()
        if self.optimizer is not None and form_group_options(config) != form_group_options(callback.config):
            raise ValueError(
                "factored_lr_scale, adapter_lr_scale and frobenius_decay decide the optimizer's groups, and cannot "
                "change between two train() calls with one optimizer. Make a new trainer."
            )
        callback.config, callback.schedule = config, Schedule.parse(config.schedule)
        epoch = updates_per_epoch(train_dataloader, self.args.gradient_accumulation_steps)
        run = Run(max_steps, epoch, self._drt_lr_curve(max_steps))
        plan = resolved_plan(callback.schedule, run, config, self.model)
        drt = self.drt
        fits = drt is not None and (drt.model, drt.initial_plan, drt.config) == (self.model, plan, config)
        if not fits or (drt.windows is not None and not resumed):  # a new run has its own windows
            trigger = callback.schedule.trigger
            check_export(config.export, plan, self.args, self.is_fsdp_enabled, grows=trigger is not None)
            self.drt = DynamicRank(self.model, config, plan=plan, trigger=trigger, seed=self.args.seed)
            callback.controller = self.drt
        return self.drt

    def _drt_lr_curve(self, max_steps: int) -> Any:
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            return existing_curve(self.lr_scheduler, max_steps)

        def make(optimizer: torch.optim.Optimizer) -> Any:
            kept, self.lr_scheduler = (self.lr_scheduler, self._created_lr_scheduler), None
            try:
                return self.create_scheduler(num_training_steps=max_steps, optimizer=optimizer)
            finally:
                self.lr_scheduler, self._created_lr_scheduler = kept

        return simulated_curve(make, self.args.learning_rate, max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The base's optimizer, with form groups and step hooks where the settings need them."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.drt is not None:
            self.drt.install(optimizer)
        return optimizer

    @contextlib.contextmanager
    def _drt_around_switch(self) -> Iterator[None]:
        """After the block, in which the model changes form, distributed engine and compiler see the new parameters."""
        wrapped = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        with contextlib.ExitStack() as stack:
            if isinstance(wrapped, DistributedDataParallel):
                handler = self.accelerator.ddp_handler
                stack.enter_context(renewed_reducer(wrapped, handler.to_kwargs() if handler is not None else {}))
            yield
        if self.args.torch_compile:
            # Graphs of old structures count against dynamo's recompile limit, past which it runs eagerly in silence.
            torch._dynamo.reset()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The base's batches of one update step; looked at on the way for throughput and for the probe."""
        result = super().get_batch_samples(*args, **kwargs)
        if self._drt_callback is not None and result[0]:
            self._drt_probe.batch = result[0][0]
            self._drt_callback.batches = result[0]
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's; its loss is added up where a trigger wants to know it."""
        loss = super().training_step(*args, **kwargs)
        if self.drt is not None and self.drt.windows is not None:
            self._drt_losses = self._drt_losses + loss.detach()
        return loss

    def _drt_step_loss(self) -> torch.Tensor:
        """The loss of the update step that ends, alike on all processes."""
        loss, self._drt_losses = torch.as_tensor(self._drt_losses, device=self.args.device), 0.0
        return self.accelerator.reduce(loss, "mean")

    # ---- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._drt_callback is None:
            return super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        own, limit = self.args.should_save, self.args.save_total_limit
        with self._drt_saving(True), written_whole(folder, own, limit, self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)

    @contextlib.contextmanager
    def _drt_saving(self, checkpoint: bool) -> Iterator[None]:
        """What ``_save`` is to write in the block: a checkpoint, or the model for its user."""
        outer, self._drt_in_checkpoint = self._drt_in_checkpoint, checkpoint
        try:
            yield
        finally:
            self._drt_in_checkpoint = outer

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._drt_callback is not None:
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._drt_callback is None:
            return super()._save(output_dir, state_dict=state_dict)
        if not self._drt_in_checkpoint:
            super()._finish_current_push()  # it may still read what is about to be written over
        with hidden_token(self.args):
            if self._drt_in_checkpoint:
                self._drt_save_in_form(output_dir, state_dict)
            else:
                folder = output_dir if output_dir is not None else self.args.output_dir
                repository = getattr(self, "hub_model_id", None)
                save_export(self.model, folder, self._drt_config().export, super()._save, state_dict, repository)

    def _drt_save_in_form(self, output_dir: str, state_dict: dict | None) -> None:
        with runtime_names(self.model):
            super()._save(output_dir, state_dict=state_dict and marked_state_dict(self.model, state_dict))
        if self.args.should_save:
            self._drt_callback.write_state(output_dir, self.state.global_step, self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The base's, which writes nothing for a model that FSDP saves in shards; here the user gets a whole one."""
        super().save_model(output_dir, _internal_call)
        if self.drt is not None and self._drt_saves_shards() and not self._drt_in_checkpoint:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _drt_saves_shards(self) -> bool:
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.drt is not None and self._drt_saves_shards() and self.args.should_save:  # _save is not called for them
            self._drt_callback.write_state(output_dir, self.state.global_step, self.args)

    # ---- loading

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base's training; ``resume_from_checkpoint=True`` passes over checkpoints that were cut short."""
        if resume_from_checkpoint and self._drt_callback is not None:
            last = resume_from_checkpoint is True
            if self.args.should_save:
                recover(self.args.output_dir if last else Path(resume_from_checkpoint).parent)
            self.accelerator.wait_for_everyone()
            if last:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._drt_callback is None:
            _refuse_low_rank(resume_from_checkpoint)
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.auto_find_batch_size:  # the base restores it only after the weights, but the plan depends on it
            self._train_batch_size = stored_batch_size(resume_from_checkpoint) or self._train_batch_size
        with untouched_rng():
            dataloader = self.get_train_dataloader()
        max_steps = self.set_initial_training_values(self.args, dataloader)[-1]
        controller = self._drt_controller(max_steps, dataloader, resumed=True)
        state = checked_state(resume_from_checkpoint, controller, for_resume=True)
        with self._drt_around_switch():
            self._drt_restore_structure(resume_from_checkpoint, controller, state)
            self._drt_callback.meter.load_state_dict(state.get("meter", {}))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _drt_restore_structure(self, folder: str, controller: DynamicRank, state: dict[str, Any]) -> None:
        """The checkpoint's structure, and an optimizer over it that the checkpoint's fits; or all as it was."""
        phase, optimizer = controller.phase, self.optimizer
        restore = remembered(optimizer) if optimizer is not None else lambda: None
        swaps = controller.load_state_dict(state, optimizer)
        try:
            check_optimizer(folder, self.create_optimizer())
        except Exception:
            controller.undo_load(swaps, phase)
            self.optimizer = optimizer
            restore()
            raise

    def _load_best_model(self) -> None:
        if self.drt is None:
            return super()._load_best_model()
        with self._drt_around_switch():
            folder = self.state.best_model_checkpoint
            state = checked_state(folder, self.drt, for_resume=False, fsdp=self.is_fsdp_enabled)
            self.drt.load_state_dict(state, self.optimizer, history=False)
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self.drt is not None:
            ours = tuple(f"{name}." for name in self.drt.targets)
            wrong = [k for k in (*load_result.missing_keys, *load_result.unexpected_keys) if k.startswith(ours)]
            if wrong:
                raise CheckpointError(
                    f"the checkpoint's weights do not match its {STATE_NAME}: {', '.join(wrong[:5])} is missing or "
                    "unexpected. Resume from another checkpoint."
                )
        return super()._issue_warnings_after_load(load_result)


def _refuse_low_rank(folder: str) -> None:
    """A checkpoint of dynamic-rank training must not be resumed without it."""
    if (Path(folder) / STATE_NAME).is_file():
        raise CheckpointError(
            f"{folder} was written by dynamic-rank training, which is off here. Its plan is "
            f"drt_schedule='{read_state(folder).get('plan')}'; set it and the other drt settings as they were then."
        )


class DRTTrainer(DRTTrainerMixin, Trainer):
    """``transformers.Trainer`` with dynamic-rank training; see :class:`DRTTrainerMixin`."""


class DRTSeq2SeqTrainer(DRTTrainerMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` with dynamic-rank training; see :class:`DRTTrainerMixin`."""
