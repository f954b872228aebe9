"""DRTCallback: drives a DynamicRank through the events of a Trainer's loop, and reports what it does."""

import contextlib
import logging
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, get_last_checkpoint

from hf_drt.checkpoint import write_state
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.optim import form_group_options
from hf_drt.planning import LayersOf, resolved_plan
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Run
from hf_drt.trainer.announce import announce
from hf_drt.trainer.checkpoint import random_state_files
from hf_drt.trainer.delivery import deliver
from hf_drt.trainer.lr import existing_curve, is_fused
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.refusals import refuse_anchors_with_scaler, refuse_lone_process, refuse_own_rate, refuse_unused
from hf_drt.transition import Transition

logger = logging.getLogger(__name__)

_LIMITS = (
    "DRTCallback in a plain Trainer cannot resume: the Trainer loads weights before any callback runs, into a model of "
    "the wrong structure. Use DRTTrainer or DRTTrainerMixin to resume from a checkpoint."
)


class DRTCallback(TrainerCallback):
    """Dynamic-rank training as a callback.

    Part of :class:`hf_drt.DRTTrainer`, or on its own in a plain ``Trainer`` on one process. On its own it cannot resume
    (``drt_state.json`` is written all the same, so that DRTTrainer can), load the best model at the end, measure the
    function-preservation error, or use form groups (``factored_lr_scale``, ``adapter_lr_scale``,
    ``frobenius_decay``); it says so when asked to.

    Args:
        config: Settings, or just the schedule's text.
        log: Receives each row of metrics. In a plain Trainer rows go to ``state.log_history``; assign ``trainer.log``
            to send them to TensorBoard and other reports too.

    Raises:
        ValueError: No schedule, or one that cannot be read.
    """

    def __init__(self, config: DRTConfig | str, log: Callable[[dict[str, float]], None] | None = None):
        self.config = DRTConfig.of(config)
        if self.config.parsed is None:
            raise ValueError("DRTCallback needs a schedule, e.g. 'factored@0 dense@40% adapter@80%'; got None.")
        self.schedule = self.config.parsed
        self._layers = LayersOf()
        self.log = log
        self.controller: DynamicRank | None = None
        self.meter = PhaseMeter()
        self.probe: Callable[[], torch.Tensor | None] | None = None
        self.first_transition: Transition | None = None
        self.batches: list[Any] = []
        self.step_loss: Callable[[], torch.Tensor | None] = lambda: None
        self.around_switch: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self.in_drt_trainer = False
        self.evaluates_at: int | None = None  # update step whose evaluation nothing but a switch has asked for
        self.saves_at: int | None = None  # update step that a switch has asked to save

    # ---- on its own: what DRTTrainer does before the loop

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.in_drt_trainer:
            return
        self._check_alone(args, kwargs["model"])
        if get_last_checkpoint(args.output_dir) is not None:
            logger.warning("output_dir holds checkpoints. If you mean to resume from one: %s", _LIMITS)

    def _check_alone(self, args: TrainingArguments, model: Any) -> None:
        """What a callback cannot do in a plain Trainer is refused, not done wrong."""
        if args.world_size > 1:
            raise ValueError(f"DRTCallback runs on one process, got {args.world_size}. Use DRTTrainer.")
        refuse_lone_process(args)
        several = len(self.schedule.entries) > 1 or self.schedule.trigger is not None
        if args.load_best_model_at_end and several:
            raise ValueError(
                "load_best_model_at_end loads weights of one phase into the structure of another in a plain Trainer. "
                "Use DRTTrainer, or set load_best_model_at_end=False."
            )
        if several:
            self._check_switches_alone(args)
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
        if form_group_options(self.config):
            raise ValueError(
                "factored_lr_scale, adapter_lr_scale and frobenius_decay need parameter groups from before the "
                "scheduler is made. Use DRTTrainer."
            )
        if not EXPORTERS[self.config.export].by_plain_trainer or self.config.tag_phases:
            raise ValueError(
                "export=adapter and tag_phases need DRTTrainer's own way to save and to push, which a plain Trainer "
                "does not have. Use DRTTrainer, or leave them out."
            )
        refuse_unused(model, self.config, self._layers(model, self.config))

    def _check_switches_alone(self, args: TrainingArguments) -> None:
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
        if not self.in_drt_trainer:
            self._begin_alone(args, state, kwargs)
        announce(self.controller.resolved, args, state)
        first = self.first_transition
        self.meter.start_phase(self.controller.phase, args.device, first.seconds if first is not None else 0.0)
        cost = self.controller.cost()
        if first is not None:
            row = {"drt_plan_flops": round(cost.flops, 4), "drt_plan_parameters": round(cost.parameters, 4)}
            self._log(state, row | _switch_row(first))
            self.first_transition = None

    def _begin_alone(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        if state.global_step > 0:
            raise ValueError(_LIMITS)
        model, scheduler = kwargs["model"], kwargs["lr_scheduler"]
        self._check_alone(args, model)  # on_init_end is too early for a callback that is added later
        refuse_own_rate(kwargs["optimizer"], self.config, self.schedule)
        epoch = updates_per_epoch(kwargs["train_dataloader"], args.gradient_accumulation_steps)
        optimizer = kwargs["optimizer"]
        refuse_anchors_with_scaler(self.schedule, getattr(optimizer, "scaler", None), is_fused(optimizer))
        run = Run(state.max_steps, epoch, existing_curve(scheduler, state.max_steps))
        plan = resolved_plan(self.config, run, model, self._layers(model, self.config))
        self.controller = DynamicRank(model, self.config, plan=plan, seed=args.seed, in_trainer=True)
        self.first_transition = self.controller.apply(0, optimizer)
        self.meter = PhaseMeter()

    # ---- in the loop

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        switch = self.around_switch() if self.controller.match(state.global_step) else contextlib.nullcontext()
        with switch:
            transition = self.controller.begin_step(state.global_step, kwargs["optimizer"], self.probe)
        if transition is not None:
            self.meter.start_phase(transition.phase, args.device, transition.seconds)
            self._log(state, _switch_row(transition))
            logger.info("update step %d: phase %d (%s)", transition.step, transition.phase, transition.kind)
        if self.in_drt_trainer:
            self.meter.count(self.batches, args.world_size)
        else:
            self.meter.samples += args.train_batch_size * args.gradient_accumulation_steps
        self.meter.start_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.meter.end_step()
        step = state.global_step
        row = self._observe(step)
        plan = self.controller.plan
        phase_ends = step == plan.end_of(self.controller.phase)
        every = self.config.log_rank_steps
        row |= self.meter.row() if phase_ends else {}
        if every and (phase_ends or step % every == 0):
            row |= self._rank_row()
        if row:
            due = control.should_log
            self._log(state, row)
            control.should_log = due  # Trainer.log takes its own row, of the loss, for logged
        self._ask(args, state, control, phase_ends)

    def _ask(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, phase_ends: bool) -> None:
        """Evaluate and save at the end of a phase. A score that may become the best one is saved with its weights,
        which load_best_model_at_end looks for; under save_strategy=best the Trainer sees to that itself."""
        switches = phase_ends and state.global_step < self.controller.plan.max_steps
        evaluates = switches and self.config.evaluate_at_switch and not _is_delayed(args, state)
        loads_best = args.load_best_model_at_end and args.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST)
        saves = (switches and self.config.save_at_switch) or (phase_ends and self.config.tag_phases)
        saves = saves or (evaluates and loads_best)
        self.evaluates_at = state.global_step if evaluates and not control.should_evaluate else None
        self.saves_at = state.global_step if saves else None
        control.should_evaluate |= evaluates
        control.should_save |= saves

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluates_at = None  # an evaluation that follows is the Trainer's

    def _observe(self, step: int) -> dict[str, float]:
        """Let a trigger look, and report what it saw."""
        windows = self.controller.windows
        if windows is None:
            return {}
        checks = len(windows.trace)
        begins = self.controller.observe(step, self.step_loss())
        if len(windows.trace) == checks:
            return {}
        check = windows.trace[-1]
        if check["decision"] is not None:
            what = "begins" if begins else "is due, but would exceed the budget"
            logger.info("update step %d: a full-rank window %s (signal: %s)", step, what, check["decision"])
        return {"drt_effective_rank_mean": check["effective_rank"], "drt_window": float(begins)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.in_drt_trainer:
            self.write_state(f"{args.output_dir}/checkpoint-{state.global_step}", state.global_step, args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self.controller.plan.end_of(self.meter.phase):  # stopped early, within a phase
            self._log(state, self.meter.row())
        if not self.in_drt_trainer and EXPORTERS[self.config.export].in_place:
            deliver(self.controller, kwargs["optimizer"])

    def write_state(self, folder: str, step: int, args: TrainingArguments) -> None:
        """Write ``drt_state.json`` into a checkpoint folder."""
        state = {"step": step, "random_states": random_state_files(args), **self.controller.state_dict()}
        write_state(folder, state | {"meter": self.meter.state_dict()})

    # ---- rows

    def _log(self, state: TrainerState, row: dict[str, float]) -> None:
        row = {**row, "drt_seconds": round(self.meter.trained, 4)}
        if self.log is not None:
            self.log(row)
        else:
            state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})

    def _rank_row(self) -> dict[str, float]:
        ranks = self.controller.effective_ranks()
        row = {
            "drt_effective_rank_mean": statistics.fmean(ranks.values()),
            "drt_effective_rank_min": min(ranks.values()),
        }
        if self.config.log_rank_per_layer:
            row |= {f"drt_effective_rank/{name}": rank for name, rank in ranks.items()}
        return row


def _is_delayed(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether eval_delay, in the unit of eval_strategy, forbids an evaluation yet."""
    match args.eval_strategy:
        case IntervalStrategy.STEPS:
            return state.global_step < args.eval_delay
        case IntervalStrategy.EPOCH:
            return state.epoch < args.eval_delay
    return False


def updates_per_epoch(dataloader: Any, accumulation: int) -> int | None:
    """Update steps of one epoch, as the Trainer counts them: a last, shorter accumulation is one too. None without a
    length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(math.ceil(batches / accumulation), 1)


def _switch_row(transition: Transition) -> dict[str, float]:
    row = {
        "drt_phase": transition.phase,
        "drt_trainable_parameters": transition.parameters[1],
        "drt_switch_seconds": round(transition.seconds, 4),
        "drt_truncation_error": transition.truncation_error,
        "drt_merge_error": transition.merge_error,
    }
    if transition.function_error is not None:
        row["drt_function_error"] = transition.function_error
    return row
