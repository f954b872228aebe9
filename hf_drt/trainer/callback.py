"""DRTCallback: dynamic-rank training as a callback of a plain Trainer, and what that cannot do."""

import logging
import math
import os
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.optim import form_group_options, group_settings
from hf_drt.planning import LayersOf, resolved_plan, schedule_of, settled
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Run
from hf_drt.trainer.activations import refuse_activations
from hf_drt.trainer.autocast import compute_by, refuse_dtypes_in_callback
from hf_drt.trainer.compiler import CompiledGraphs, refuse_regions
from hf_drt.trainer.delivery import deliver
from hf_drt.trainer.driver import PhaseDriver
from hf_drt.trainer.elastic import Batch
from hf_drt.trainer.events import DriverEvents
from hf_drt.trainer.fallbacks import warn_of_fallbacks
from hf_drt.trainer.loop import Log, PlainLoop
from hf_drt.trainer.lr import existing_curve, is_fused
from hf_drt.trainer.optimizers import refuse_unsaved
from hf_drt.trainer.refusals import refuse_anchors_with_scaler, refuse_lone_process, refuse_own_rate, refuse_unused

logger = logging.getLogger(__name__)

_LIMITS = (
    "DRTCallback in a plain Trainer cannot resume: the Trainer loads weights before any callback runs, into a model of "
    "the wrong structure. Use DRTTrainer or DRTTrainerMixin to resume from a checkpoint."
)


class DRTCallback(DriverEvents):
    """Dynamic-rank training as a callback of a plain ``Trainer`` on one process.

    It cannot resume (``drt_state.json`` is written all the same, so that DRTTrainer can), load the best model at the
    end, measure the function-preservation error, or use form groups (``factored_lr_scale``, ``adapter_lr_scale``,
    ``left_lr_scale``, ``right_lr_scale``, ``frobenius_decay``, ``matrix_optimizer``); it says so when asked to.
    :class:`hf_drt.DRTTrainer` can, and has no place for it.

    Args:
        config: Settings, or just the schedule's text.
        log: Receives each row of metrics; by default rows go to ``state.log_history``. Assign ``trainer.log`` to
            the attribute to send them to TensorBoard and other reports too.

    Attributes:
        config: As given.
        schedule: That of the settings, read; from the making of a Trainer on as it is for its model.
        controller: That of the run, from the start of training on.

    Raises:
        ValueError: No schedule, or one that cannot be read.
    """

    def __init__(self, config: DRTConfig | str, log: Log | None = None):
        self.config = DRTConfig.of(config)
        if self.config.parsed is None:
            raise ValueError("DRTCallback needs a schedule, e.g. 'factored@0 dense@40% adapter@80%'; got None.")
        self.schedule = self.config.parsed
        self._layers = LayersOf()
        self._loop = PlainLoop(log)
        self._driver: PhaseDriver | None = None
        self._graphs: CompiledGraphs | None = None  # of a compiled model

    @property
    def log(self) -> Log | None:
        """Receives each row of metrics; may be assigned."""
        return self._loop.sink

    @log.setter
    def log(self, sink: Log | None) -> None:
        self._loop.sink = sink

    @property
    def controller(self) -> DynamicRank | None:
        """That of the run, from the start of training on."""
        return self._driver.controller if self._driver is not None else None

    @property
    def driver(self) -> PhaseDriver:
        if self._driver is None:
            raise RuntimeError("DRTCallback was added after training had begun. Add it before trainer.train().")
        return self._driver

    # ---- what DRTTrainer does before the loop

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(args, kwargs["model"])
        if get_last_checkpoint(args.output_dir) is not None:
            logger.warning("output_dir holds checkpoints. If you mean to resume from one: %s", _LIMITS)

    def _check(self, args: TrainingArguments, model: Any) -> None:
        """What a callback cannot do in a plain Trainer is refused, not done wrong."""
        if args.world_size > 1:
            raise ValueError(f"DRTCallback runs on one process, got {args.world_size}. Use DRTTrainer.")
        if args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise ValueError(
                "DRTCallback cannot make DeepSpeed's engine anew after a change of form: it has no access to it. Use "
                "DRTTrainer, or leave deepspeed out."
            )
        refuse_lone_process(args)
        config = settled(self.config, model)
        self.schedule = schedule_of(config)
        several = len(self.schedule.entries) > 1 or self.schedule.trigger is not None
        if args.load_best_model_at_end and several:
            raise ValueError(
                "load_best_model_at_end loads weights of one phase into the structure of another in a plain Trainer. "
                "Use DRTTrainer, or set load_best_model_at_end=False."
            )
        if several:
            self._check_switches(args)
        if args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint saves without an event in a plain Trainer, so that drt_state.json would be "
                "missing. Use DRTTrainer, or set enable_jit_checkpoint=False."
            )
        if self.schedule.trigger is not None and self.schedule.trigger.signal != "rank":
            raise ValueError(
                f"DRTCallback in a plain Trainer does not see the loss, which signal={self.schedule.trigger.signal} of "
                "the preset adaptive needs. Use DRTTrainer, or adaptive(signal=rank)."
            )
        if form_group_options(config):
            raise ValueError(
                f"{group_settings(config)}: this needs parameter groups from before the scheduler is made. Use "
                f"DRTTrainer.{config.without_matrix_optimizer}"
            )
        if self.config.dense_accumulation > 1:
            raise ValueError(
                "dense_accumulation divides the batches of a training step, and a callback in a plain Trainer sees "
                "none of them. Use DRTTrainer, or gradient_accumulation_steps."
            )
        refuse_dtypes_in_callback(args, config)
        refuse_activations(model, args, config)
        if not EXPORTERS[self.config.export].by_plain_trainer or self.config.tag_phases:
            raise ValueError(
                "export=adapter, linear-pairs and tag_phases need DRTTrainer's own way to save and push, which a plain "
                "Trainer does not have. Use DRTTrainer, or leave them out."
            )
        layers = self._layers(model, self.config)
        refuse_regions(model, layers.shapes)
        refuse_unused(model, self.config, layers)

    def _check_switches(self, args: TrainingArguments) -> None:
        """A plain Trainer drops a save at a step that is evaluated under save_strategy=best, and takes any score for
        the best one, be its weights saved or not."""
        saves, best = self.config.save_at_switch, args.save_strategy == SaveStrategy.BEST
        if saves and best:
            raise ValueError(
                "save_at_switch is dropped by a plain Trainer under save_strategy=best, where the step is evaluated "
                "too. Use DRTTrainer, or save_strategy=steps or epoch."
            )
        if self.config.evaluate_at_switch and args.metric_for_best_model is not None and not (saves or best):
            raise ValueError(
                "evaluate_at_switch with metric_for_best_model: in a plain Trainer the score at a switch could become "
                "the best one, though no checkpoint has its weights. Use DRTTrainer, or turn save_at_switch on."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._driver = self._begin(args, state, kwargs)
        super().on_train_begin(args, state, control, **kwargs)

    def _begin(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> PhaseDriver:
        if state.global_step > 0:
            raise ValueError(_LIMITS)
        if self._driver is not None:  # of a run that may have failed
            self._driver.leave()
        if self._graphs is not None:
            self._graphs.leave()
        model, scheduler = kwargs["model"], kwargs["lr_scheduler"]
        self._check(args, model)  # on_init_end is too early for a callback that is added later
        warn_of_fallbacks(args)
        refuse_unsaved(kwargs["optimizer"], args, self.config)
        refuse_own_rate(kwargs["optimizer"], settled(self.config, model), self.schedule)
        epoch = updates_per_epoch(kwargs["train_dataloader"], args.gradient_accumulation_steps)
        optimizer = kwargs["optimizer"]
        refuse_anchors_with_scaler(self.schedule, getattr(optimizer, "scaler", None), is_fused(optimizer))
        run = Run(state.max_steps, epoch, existing_curve(scheduler, state.max_steps))
        plan = resolved_plan(self.config, run, model, self._layers(model, self.config))
        controller = DynamicRank(model, self.config, plan=plan, seed=args.seed, in_trainer=True)
        self._graphs = graphs = CompiledGraphs.found()
        self._loop.switched = None if graphs is None else lambda: graphs.switched(controller.plan)
        driver = PhaseDriver(controller, self._loop, first=controller.apply(0, optimizer))
        compute_by(driver, model, config=settled(self.config, model))
        return driver

    # ---- in the loop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        note = {} if args.auto_find_batch_size else Batch.of(args).note()
        self.driver.write_state(f"{args.output_dir}/checkpoint-{state.global_step}", state.global_step, args, note)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if EXPORTERS[self.config.export].in_place:
            with self._loop.around_switch():
                deliver(self.driver.controller, kwargs["optimizer"])
        if self._graphs is not None:
            self._graphs.leave()


def updates_per_epoch(dataloader: Any, accumulation: int) -> int | None:
    """Update steps of one epoch, as the Trainer counts them: a last, shorter accumulation is one too. None without a
    length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(math.ceil(batches / accumulation), 1)
