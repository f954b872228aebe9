"""DRTTrainerMixin: overrides of methods of ``transformers.Trainer``; trainer/publishing.py and averaging.py have more.

What each override is for:

- ``_prepare_for_training``: resolves the plan and applies the first phase, once max_steps is known and before the
  optimizer is made.
- ``_load_optimizer_and_scheduler``: the last moment at which a resumed run's scheduler stands at its beginning.
- ``create_optimizer``: form groups and step hooks, before the scheduler is made.
- ``get_batch_samples``: sees the batches; counts them, and keeps one as the probe of a switch.
- ``training_step``: sees the losses, for full-rank windows that a trigger begins; divides batches into pieces.
- ``compute_loss``: the loss of a piece, by its weight.
- ``_save_checkpoint``, ``save_model``, ``_save``: checkpoints keep their form and get ``drt_state.json``; models saved
  by the user are what drt_export says. A save that fails leaves no unfinished files, and a checkpoint that it was to
  replace.
- ``_determine_best_metric``: the best score is one whose weights are saved, and a save that a switch asks for is made.
- ``_save_rng_state``: every process has written its own before ``trainer_state.json`` says that the checkpoint is
  whole, and before older ones are deleted.
- ``_hp_search_setup``: values of a search that would have no effect are refused.
- ``train``: resume_from_checkpoint=True means the last complete checkpoint, "auto" that or none. What
  ``_load_from_checkpoint`` does in it waits for ``_prepare_for_training``.
- ``_load_rng_state``: a process that the checkpoint's run did not have takes the random state of one that it had.
- ``_load_from_checkpoint``, ``_load_best_model``: structure before weights, since the Trainer loads non-strictly.
- ``_issue_warnings_after_load``: a missing key of ours is an error, no warning.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_drt.checkpoint import STATE_NAME, CheckpointError
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.engines import engine_of
from hf_drt.export import check_export
from hf_drt.optim import GROUP_SETTINGS, form_group_options
from hf_drt.planning import LayersOf, refuse_without_schedule, settled
from hf_drt.registry import EXPORTERS
from hf_drt.trainer.aside import hidden_token, upcast_bases
from hf_drt.trainer.autocast import compute_in_phases
from hf_drt.trainer.averaging import AveragingMixin
from hf_drt.trainer.checkpoint import checked_state, readable_state
from hf_drt.trainer.compiler import CompiledGraphs
from hf_drt.trainer.delivery import Delivery, deliver
from hf_drt.trainer.driver import PhaseDriver
from hf_drt.trainer.elastic import Batch, noted, rows_kept
from hf_drt.trainer.engine_files import files_of_run, saves_shards
from hf_drt.trainer.events import TrainerEvents
from hf_drt.trainer.fallbacks import warn_of_fallbacks
from hf_drt.trainer.jit import save_at_step_end
from hf_drt.trainer.loop import TrainerLoop
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.optimizers import refuse_optimizer
from hf_drt.trainer.outermost import call_with, wrap_overrides
from hf_drt.trainer.pieces import Pieces
from hf_drt.trainer.push import Publisher
from hf_drt.trainer.random_states import random_states
from hf_drt.trainer.rates import RunRates
from hf_drt.trainer.refusals import refuse_layers, refuse_own_rate_of, refuse_unsupported, refuse_unused
from hf_drt.trainer.resolving import resolution_of
from hf_drt.trainer.restore import begin, optimizer_made, restore
from hf_drt.trainer.resume import AUTO, asked_for, checkpoint_for, last_finished, refuse_low_rank
from hf_drt.trainer.saving import written_whole
from hf_drt.trainer.search import checked_search, settings_of
from hf_drt.trainer.undo import as_it_was_on_failure, loaded_in_full
from hf_drt.trainer.writer import ModelWriter
from hf_drt.trainer.zero import counts_of, prepared_for_zero, refuse_second_run, take_rates

# The seams and their parameters; tests/trainer/test_seams.py fails first if transformers moves one.
# fmt: off
SEAMS: dict[str, tuple[str, ...]] = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_hp_search_setup": ("trial",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "create_optimizer": ("model",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "_determine_best_metric": ("metrics", "trial"),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "save_model": ("output_dir", "_internal_call"),
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
    "_load_rng_state": ("checkpoint",),
    "evaluation_loop": ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    "_issue_warnings_after_load": ("load_result",),
    "create_scheduler": ("num_training_steps", "optimizer"),  # used by rates.py
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_input": ("data",),  # used by probe.py
    "compute_loss_context_manager": (),  # used by probe.py
}
# fmt: on


class _Default(Protocol):
    def __call__(self) -> DRTConfig: ...


class DRTTrainerMixin(AveragingMixin):
    """Dynamic-rank training for any subclass of ``Trainer``: ``class MyTrainer(DRTTrainerMixin, SomeTrainer)``.

    Settings come from ``drt=`` (a :class:`hf_drt.DRTConfig`; a schedule's text goes with the other arguments), or from
    ``drt_*`` fields of the training arguments. Without a schedule the trainer behaves exactly like its base.

    ``save_model()`` writes what ``drt_export`` says, by default a dense model; checkpoints keep their phase's form.

    Attributes:
        drt: The controller, from the start of training on; None while DRT is off.

    Raises:
        ValueError: The configuration is invalid, selects no layer, or meets an engine that is not supported.
    """

    # Settings of every trainer that brings none of its own; ``python -m hf_drt.run`` sets it.
    _drt_default: "_Default | None" = None
    _drt_resume: str | None = None  # where the script says nothing of it; of ``python -m hf_drt.run``
    _drt_given: DRTConfig | str | None = None
    _drt_driver: PhaseDriver | None = None  # of the latest run
    _drt_made: torch.optim.Optimizer | None = None
    _drt_starting = False
    _drt_batch: Batch | None = None  # of the present run
    _drt_load: Callable[[], Any] | None = None
    _drt_pieces: Pieces | None = None  # with dense_accumulation
    _drt_graphs: CompiledGraphs | None = None  # of a compiled model

    def __init__(self, *args: Any, drt: DRTConfig | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._drt_given = drt
        config = self._drt_config()
        self._drt_refuse_callbacks()
        if config.schedule is None:
            return
        config = settled(config, self.model)
        self._drt_refuse_optimizer(config)
        refuse_unsupported(self, config)
        warn_of_fallbacks(self.args)
        # Settings without effect are refused before there is a plan, which gets the same layers.
        self._drt_layers = LayersOf()
        layers = self._drt_layers(self.model, config)
        refuse_layers(self, config, layers)
        refuse_unused(self.model, config, layers)
        self._drt_pieces = Pieces.of(self, config.dense_accumulation)
        self._drt_loop, self._drt_rates = TrainerLoop(self), RunRates(self)
        self._drt_graphs = CompiledGraphs.found()
        self._drt_writer = ModelWriter(self, lambda: self._drt_config().export, self._drt_write_state)
        self._drt_publisher = Publisher(self.args, self._drt_publish)
        if self.args.push_to_hub and self.is_world_process_zero():
            self._drt_publisher.make_branch(self.hub_model_id)
        self.add_callback(TrainerEvents(self))
        self.callback_handler.callbacks.insert(0, Delivery(self))
        self._drt_settings = config
        compute_in_phases(self, config)
        save_at_step_end(self)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        wrap_overrides(cls)

    def _drt_refuse_late_settings(self) -> None:
        off, schedule = self._drt_settings is None, self._drt_config().schedule
        if off != (schedule is None):
            raise ValueError(
                f"dynamic-rank training was {'off' if off else 'on'} when this trainer was made, and the schedule has "
                f"become {schedule!r} since. Make a new trainer."
            )

    def _drt_refuse_optimizer(self, config: DRTConfig) -> None:
        refuse_optimizer(self, config)
        refuse_own_rate_of(self, config)

    def _drt_config(self) -> DRTConfig:
        """The settings in force: the trainer's own, or those of ``hf_drt.run``; never a mixture.

        Raises:
            ValueError: There are both.
        """
        own = self._drt_own_config()
        if self._drt_default is None:
            refuse_without_schedule(own)
            return own
        if own != DRTConfig():
            raise ValueError(
                f"this {type(self).__name__} has dynamic-rank settings of its own (schedule={own.schedule!r}), and "
                "hf_drt.run was given others. Run the script without hf_drt.run, or take its settings out."
            )
        return self._drt_default()

    def _drt_own_config(self) -> DRTConfig:
        """Read anew from the arguments: a hyperparameter search changes them between runs."""
        return settings_of(self._drt_given, self.args)

    def _hp_search_setup(self, trial: Any) -> None:
        given = self._drt_given if self._drt_default is None else self._drt_default()
        with checked_search(self, trial, self._drt_settings is not None, given):
            super()._hp_search_setup(trial)

    # ---- the plan, and the model in its first phase

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._drt_refuse_callbacks()
        self._drt_refuse_late_settings()
        if self._drt_settings is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        refuse_second_run(self)
        self._drt_loop.restart()
        self._drt_starting = False
        controller = self._drt_controller(max_steps, train_dataloader, resume_from_checkpoint)
        fresh = resume_from_checkpoint is None
        with as_it_was_on_failure(self, controller) if fresh else contextlib.nullcontext():
            self._drt_begin(controller, resume_from_checkpoint)
            with optimizer_made(self), prepared_for_zero(self, resume_from_checkpoint):
                prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            if resume_from_checkpoint is None:
                self._drt_rates.settle(controller, self._drt_resolution)
            return prepared

    def _drt_begin(self, controller: DynamicRank, folder: str | None) -> None:
        """The model in its first phase, or as a checkpoint has it; before the optimizer is made."""
        if folder is None:
            with self._drt_around_switch():  # a second train() finds its model wrapped
                first = begin(self, controller)
            self._drt_driver = PhaseDriver(controller, self._drt_loop, first)
        elif files_of_run(self):
            self._drt_restore_before_sharding(folder, controller)
        else:
            self._drt_restore(folder, controller)
        if self.is_fsdp_enabled and self.args.mixed_precision != "no" and not engine_of(self.model).sharded:
            upcast_bases(self.model)

    def _drt_restore_before_sharding(self, folder: str, controller: DynamicRank) -> None:
        """FSDP and DeepSpeed load what they have sharded, and so after the structure has to be there."""
        state = checked_state(folder, controller, for_resume=True, engine=files_of_run(self))
        with engine_of(self.model).readable():
            restore(self, controller, state, folder, compare=False)
        self._drt_go_on(controller, state)

    def _drt_controller(self, max_steps: int, train_dataloader: Any, folder: str | None) -> DynamicRank:
        """The controller of this model and run: the present one if it fits, else a new one."""
        before, resumed = self._drt_settings, folder is not None
        config = settled(self._drt_config(), self.model, resumed)
        self._drt_refuse_optimizer(config)
        layers = self._drt_layers(self.model, config)  # of another model after model_init or a search's trial
        self._drt_resolution = resolution_of(self, config, layers, max_steps, train_dataloader, folder)
        if self.optimizer is not None and form_group_options(config) != form_group_options(before or config):
            raise ValueError(
                f"{GROUP_SETTINGS} decide the optimizer's groups, and cannot change between two "
                "train() calls with one optimizer. Make a new trainer."
            )
        self._drt_settings, self._drt_pieces = config, Pieces.of(self, config.dense_accumulation)
        compute_in_phases(self, config)
        plan = self._drt_rates.first_plan(self._drt_resolution, resumed)
        drt = self.drt
        fits = drt is not None and (drt.model, drt.initial.plan, drt.config) == (self.model, plan.plan, config)
        if drt is None or not fits or ((drt.windows or drt.turns) is not None and not resumed):  # it decides anew
            grows = plan.trigger is not None
            check_export(config.export, plan.plan, self.args, bool(files_of_run(self)), grows=grows)
            drt = self.drt = DynamicRank(self.model, config, plan=plan, seed=self.args.seed, in_trainer=True)
        return drt

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._drt_average_from(checkpoint)
        if checkpoint is not None and self._drt_settings is not None:
            self._drt_rates.settle(self._drt_running().controller, self._drt_resolution, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._drt_settings is not None:
            take_rates(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The base's optimizer, with form groups and step hooks where the settings need them."""
        super().create_optimizer(*args, **kwargs)
        if self.drt is not None:
            self.drt.install(self.optimizer)
        return self.optimizer

    @contextlib.contextmanager
    def _drt_around_switch(self) -> Iterator[None]:
        """After the block, in which the model changes form, distributed engine and compiler see the new parameters."""
        handler = self.accelerator.ddp_handler
        with engine_of(self.model_wrapped).around_switch(handler.to_kwargs() if handler is not None else {}):
            yield
        if self._drt_graphs is not None and self.drt is not None:
            self._drt_graphs.switched(self.drt.plan)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The base's batches of one update step; looked at on the way for throughput and for the probe."""
        result = super().get_batch_samples(*args, **kwargs)
        if self._drt_settings is not None:
            self._drt_loop.saw_batches(result[0])
        return result

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The base's, in pieces in dense phases; its loss is added up where a trigger wants to know it."""
        if self._drt_pieces is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            dense = self._drt_running().trains_dense
            loss = self._drt_pieces.step(super().training_step, model, inputs, num_items_in_batch, dense)
        if self.drt is not None and self.drt.windows is not None:
            self._drt_loop.saw_loss(loss)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, by the weight of a piece in its batch."""
        loss = super().compute_loss(*args, **kwargs)
        return loss if self._drt_pieces is None else self._drt_pieces.weighted(loss)

    # ---- saving

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The base's answer, which decides on a save under ``save_strategy=best`` and nothing else; see
        :meth:`hf_drt.trainer.requests.SwitchRequests.saves_best`."""
        compare = partial(super()._determine_best_metric, metrics=metrics, trial=trial)
        if self._drt_driver is None:
            return compare()
        return self._drt_driver.requests.saves_best(self.args, self.state, self.control, compare)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._drt_settings is None:
            return super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        own, limit = self.args.should_save, self.args.save_total_limit
        with self._drt_writer.writing(True), written_whole(folder, own, limit, self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._drt_settings is not None:
            self.accelerator.wait_for_everyone()

    def _drt_around_saving(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Around ``save_model(output_dir, ...)`` and ``_save(output_dir, state_dict)``, whoever overrides them."""
        if self._drt_settings is None:
            return write(*args, **kwargs)
        if not self._drt_writer.checkpoint:
            self._drt_wait_for_push()
        state = kwargs.get("state_dict", args[1] if len(args) > 1 and isinstance(args[1], dict) else None)
        if state is None and not self._drt_writer.checkpoint and engine_of(self.model).sharded:
            return write(*args, **kwargs)  # which gathers the model, and then comes by here with its state

        def save(folder: str, state: dict | None) -> None:
            changed = {"output_dir": (0, folder)} | ({"state_dict": (1, state)} if state is not None else {})
            call_with(write, args, kwargs, changed)

        self._drt_writer.write(save, kwargs.get("output_dir", args[0] if args else None), state)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The base's, in the form of ``drt_export``."""
        self._drt_around_saving(self._drt_save_whole, *args, **kwargs)

    def _drt_save_whole(self, *args: Any, **kwargs: Any) -> None:
        """The base's, which writes nothing for a model that FSDP saves in shards; here the user gets a whole one. Its
        push comes once all is written and the model is itself again."""
        save = super().save_model
        transformers_own = getattr(save, "__func__", None) is Trainer.save_model
        if self._drt_settings is not None and transformers_own and self.args.push_to_hub:
            if not kwargs.get("_internal_call", len(args) > 1 and args[1]):
                push = partial(self.push_to_hub, commit_message="Model save", revision=self.args.hub_revision)
                self._drt_writer.once_written(push)
            call_with(save, args, kwargs, {"_internal_call": (1, True)})
        else:
            save(*args, **kwargs)
        if self._drt_settings is not None and saves_shards(self) and not self._drt_writer.checkpoint:
            folder = kwargs.get("output_dir", args[0] if args else None) or self.args.output_dir
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))

    def _drt_around_save(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with hidden_token(self.args) if self._drt_settings is not None else contextlib.nullcontext():
            self._drt_around_saving(write, *args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        self._drt_around_save(super()._save, *args, **kwargs)

    def _drt_write_state(self, folder: str) -> None:
        self._drt_running().write_state(
            folder, self.state.global_step, self.args, noted(self._drt_batch) | counts_of(self)
        )

    def _drt_deliver(self) -> None:
        """At the end of training: the model itself in the form of ``drt_export``, where it can take it."""
        if EXPORTERS[self._drt_config().export].in_place:
            with self._drt_around_switch():
                deliver(self._drt_running().controller, self.optimizer)

    # ---- loading

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base's training; ``resume_from_checkpoint=True`` passes over checkpoints that were cut short, and so does
        "auto", which begins a new run where there is none yet."""
        asked = asked_for(resume_from_checkpoint, self._drt_resume)
        if self._drt_settings is None:
            return super().train(last_finished(self.args.output_dir) if asked == AUTO else asked, *args, **kwargs)
        folder = checkpoint_for(self, asked)
        self._drt_starting = True
        try:
            with rows_kept(self, folder) as self._drt_batch:
                return super().train(folder, *args, **kwargs)
        finally:
            self._drt_starting, self._drt_load = False, None
            if self._drt_driver is not None:
                self._drt_driver.leave()
            if self._drt_graphs is not None:
                self._drt_graphs.leave()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with random_states(checkpoint, self.args, self._drt_settings is not None) as folder:
            super()._load_rng_state(folder)

    def _drt_around_loading(self, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``_load_from_checkpoint(folder, ...)``, whoever overrides it.

        train() calls it before there is a data loader, and so before the plan is known; but the structure has to be
        there before the weights are. So it waits until the Trainer has made its loader: making one here would shuffle
        the data once more wherever their order comes from a global generator.
        """
        folder: str = args[0] if args else kwargs["resume_from_checkpoint"]
        if self._drt_settings is None:
            refuse_low_rank(folder)
        elif self._drt_starting and self._drt_load is None and not self.is_fsdp_enabled:
            readable_state(folder, for_resume=True)
            self._drt_load = partial(load, *args, **kwargs)
            return None
        return load(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        return self._drt_around_loading(super()._load_from_checkpoint, *args, **kwargs)

    def _drt_restore(self, folder: str, controller: DynamicRank) -> None:
        state = checked_state(folder, controller, for_resume=True)
        undone = as_it_was_on_failure(self, controller)
        with undone, self._drt_around_switch(), loaded_in_full(controller, folder):
            restore(self, controller, state, folder)
            self._drt_go_on(controller, state)
            self._drt_load()  # type: ignore[reportOptionalCall]  # train() has come by _drt_around_loading

    def _drt_go_on(self, controller: DynamicRank, state: dict[str, Any]) -> None:
        """A driver that counts on from where a checkpoint's has stopped."""
        meter = PhaseMeter()
        meter.load_state_dict(state.get("meter", {}))
        self._drt_driver = PhaseDriver(controller, self._drt_loop, meter=meter)

    def _drt_running(self) -> PhaseDriver:
        """The driver of the run in progress, or of the latest one.

        Raises:
            RuntimeError: There has been none.
        """
        if self._drt_driver is None:
            raise RuntimeError("there is no phase to tell of before trainer.train() has begun.")
        return self._drt_driver

    def _drt_around_best_model(self, load: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Around ``_load_best_model``, whoever overrides it."""
        folder = self.state.best_model_checkpoint
        if self.drt is None or folder is None:
            load(*args, **kwargs)
            return self._drt_best_average(folder)
        state = checked_state(folder, self.drt, for_resume=False, engine=files_of_run(self))
        with as_it_was_on_failure(self, self.drt), self._drt_around_switch(), loaded_in_full(self.drt, folder):
            self.drt.load_state_dict(state, self.optimizer, history=False)
            load(*args, **kwargs)
        self._drt_best_average(folder)

    def _load_best_model(self) -> None:
        return self._drt_around_best_model(super()._load_best_model)

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


class DRTTrainer(DRTTrainerMixin, Trainer):
    """``transformers.Trainer`` with dynamic-rank training; see :class:`DRTTrainerMixin`."""


class DRTSeq2SeqTrainer(DRTTrainerMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` with dynamic-rank training; see :class:`DRTTrainerMixin`."""
