"""PhaseDriver: one plan through the events of one training run, and the rows that tell of it."""

import contextlib
import logging
import statistics
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_drt.activations import Activations
from hf_drt.checkpoint import write_inputs, write_state
from hf_drt.controller import DynamicRank
from hf_drt.forms import Dense
from hf_drt.precision import BITS
from hf_drt.trainer.activations import checkpointing_options
from hf_drt.trainer.announce import announce
from hf_drt.trainer.checkpoint import random_state_files
from hf_drt.trainer.early_end import warn_of_early_end
from hf_drt.trainer.loop import Loop
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.requests import SwitchRequests
from hf_drt.transition import Transition

logger = logging.getLogger(__name__)


class PhaseDriver:
    """Drives a controller through one run; each method is what happens at one event of a Trainer's loop.

    Args:
        controller: In the phase in which the run begins, or goes on.
        loop: Of the run.
        first: The transition into the first phase, which is reported when training begins; None in a resumed run.
        meter: What a checkpoint's phase has cost so far; a new one by default.

    Attributes:
        requests: What ends of phases have asked the Trainer for.
    """

    def __init__(
        self, controller: DynamicRank, loop: Loop, first: Transition | None = None, meter: PhaseMeter | None = None
    ):
        self.controller, self.meter = controller, meter if meter is not None else PhaseMeter()
        self.requests = SwitchRequests(controller.config)
        self._loop, self._first = loop, first
        self._activations: Activations | None = None

    def train_begins(self, args: TrainingArguments, state: TrainerState) -> None:
        """Report the plan and the switch into the first phase."""
        first, cost = self._first, self.controller.cost()
        self._activations = Activations(self.controller.model, self.controller.config, checkpointing_options(args))
        self._activations.enter(self.trains_dense)
        announce(self.controller.resolved, args, state)
        self.meter.start_phase(self.controller.phase or 0, args.device, first.seconds if first is not None else 0.0)
        if first is not None:
            row = {"drt_plan_flops": round(cost.flops, 4), "drt_plan_parameters": round(cost.parameters, 4)}
            self._log(state, row | self._switch_row(first))

    def step_begins(self, args: TrainingArguments, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """Change the model's form where a phase begins with this update step."""
        step = state.global_step
        changes = self.controller.match(step) and not self.controller.recasts(self.controller.plan.index_at(step))
        with self._loop.around_switch() if changes else contextlib.nullcontext():
            transition = self.controller.begin_step(step, optimizer, self._loop.probe)
        if transition is not None:
            if self._activations is not None:
                self._activations.enter(self.trains_dense)
            self.meter.start_phase(transition.phase, args.device, transition.seconds)
            self._log(state, self._switch_row(transition))
            form = self.controller.plan.phases[transition.phase].form
            logger.info("update step %d: phase %d (%s)", transition.step, transition.phase, form)
        self._loop.count(self.meter, args)
        self.meter.start_step()

    def step_ends(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Let a trigger look, report, and ask for what is due at the end of a phase."""
        self.meter.end_step()
        self.controller.inputs.fold()
        step = state.global_step
        row = self._observe(step)
        plan = self.controller.plan  # a trigger may have added a window to it
        phase_ends = step == plan.end_of(self._phase)
        every = self.controller.config.log_rank_steps
        row |= self.meter.row() if phase_ends else {}
        if every and (phase_ends or step % every == 0):
            row |= self._rank_row()
        if row:
            due = control.should_log
            self._log(state, row)
            control.should_log = due  # Trainer.log takes its own row, of the loss, for logged
        self.requests.ask(args, state, control, phase_ends, phase_ends and step < plan.max_steps)

    def epoch_ends(self) -> None:
        """What follows is not asked for by a switch."""
        self.requests.epoch_ends()

    def train_ends(self, state: TrainerState) -> None:
        """Report a phase that was cut short, and phases that were never reached."""
        if state.global_step != self.controller.plan.end_of(self._phase):
            self._log(state, self.meter.row())
        if state.is_world_process_zero:
            warn_of_early_end(self.controller.plan, state.global_step)
        self.leave()

    def leave(self) -> None:
        """Blocks keep what they kept before the run, and no inputs are gathered; wherever it has ended."""
        self.controller.inputs.drop()
        if self._activations is not None:
            self._activations.leave()

    @property
    def dtype(self) -> str | None:
        """What the model computes in: that of its phase, after training of the last one that was trained in."""
        phase = self.controller.phase
        return self.controller.plan.phases[self._phase if phase is None else phase].dtype

    @property
    def trains_dense(self) -> bool:
        """Whether a layer is dense, and trained, by the plan in the phase that the model is in."""
        phase = self.controller.phase
        return phase is not None and self.controller.resolved.trains_dense(phase)

    def write_state(self, folder: str, step: int, args: TrainingArguments, more: dict[str, Any] | None = None) -> None:
        """Write ``drt_state.json`` into a checkpoint folder, with what else belongs there; and what is gathered of
        layers' inputs, if anything is."""
        inputs = self.controller.inputs.state_dict()
        write_inputs(folder, inputs)
        state = {"step": step, "random_states": random_state_files(args), **self.controller.state_dict()}
        state |= {"inputs": True} if inputs else {}
        write_state(folder, state | {"meter": self.meter.state_dict()} | (more or {}))

    # ---- rows

    @property
    def _phase(self) -> int:
        """Index of the phase that is trained in; at the end of training the controller may be in none any more."""
        return self.meter.phase or 0

    def _observe(self, step: int) -> dict[str, Any]:
        """Let a trigger look, and report what it saw."""
        windows = self.controller.windows
        if windows is None:
            return {}
        checks = len(windows.trace)
        begins = self.controller.observe(step, self._loop.step_loss())
        if len(windows.trace) == checks:
            return {}
        check = windows.trace[-1]
        if check["decision"] is not None:
            what = "begins" if begins else "is due, but would exceed the budget"
            logger.info("update step %d: a full-rank window %s (signal: %s)", step, what, check["decision"])
        return {"drt_effective_rank_mean": check["effective_rank"], "drt_window": float(begins)}

    def _rank_row(self) -> dict[str, float]:
        ranks = self.controller.effective_ranks()
        row = {
            "drt_effective_rank_mean": statistics.fmean(ranks.values()),
            "drt_effective_rank_min": min(ranks.values()),
        }
        if self.controller.config.log_rank_per_layer:
            row |= {f"drt_effective_rank/{name}": rank for name, rank in ranks.items()}
        return row

    def _switch_row(self, transition: Transition) -> dict[str, Any]:
        row = {
            "drt_phase": transition.phase,
            "drt_trainable_parameters": transition.parameters[1],
            "drt_switch_seconds": round(transition.seconds, 4),
            "drt_truncation_error": transition.truncation_error,
            "drt_merge_error": transition.merge_error,
        }
        if transition.rounding_error:
            row["drt_rounding_error"] = transition.rounding_error
        if transition.function_error is not None:
            row["drt_function_error"] = transition.function_error
        if (dtype := self.controller.dtype) is not None:
            row["drt_dtype_bits"] = BITS[dtype]
        ranks = [form.rank for form in self.controller.forms(transition.phase).values() if not isinstance(form, Dense)]
        return row | ({"drt_rank_min": min(ranks), "drt_rank_max": max(ranks)} if ranks else {})

    def _log(self, state: TrainerState, row: dict[str, Any]) -> None:
        self._loop.log(state, {**row, "drt_seconds": round(self.meter.trained, 4)})
