"""DynamicRank: one plan applied to one model. Usable in any training loop."""

import hashlib
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.checkpoint import check_plan, check_preset, check_structure, continued_plan, declare, lasting, structure
from hf_drt.config import DRTConfig
from hf_drt.covariance import Gathering
from hf_drt.engines import engine_of, trainable_size, warn_of_lone_process
from hf_drt.forms import Dense, Form, begins_anew, form_of, layer_ranks
from hf_drt.optim import (
    Owner,
    form_group_options,
    group_settings,
    install,
    optimizer_made_in,
    rewarmup_factor,
    staged,
    unwrap,
)
from hf_drt.planning import (
    PlanCost,
    ResolvedPlan,
    budget_of,
    check_arguments,
    check_resolved,
    check_step,
    gathered_at,
    mean_falls,
    refuse_without_optimizer,
    resolved_for,
)
from hf_drt.precision import Computing
from hf_drt.schedule import Plan, Trigger, Turns, Windows, provisional, whole_number
from hf_drt.targets import join_attention, present_layer, split_attention
from hf_drt.transition import (
    FunctionError,
    Transition,
    change_forms,
    empty_forms,
    remembered_layers,
    warn_of_rounding,
)


class DynamicRank:
    """Keeps a model's linear layers in the form that a plan asks for.

    What it keeps of a run is one integer, the phase the model is in; a change is decided by comparing it with the plan,
    never by ``step == k``, so that a resumed run does not make it twice.

    Example::

        drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@40% adapter@80%"), max_steps=1000)
        drt.apply(0)                                    # the first phase, before the optimizer is made
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for step, batch in enumerate(batches):
            drt.begin_step(step, optimizer)             # changes form where a phase begins
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        drt.to_dense()                                  # a plain model again

    Args:
        model: Any ``nn.Module`` with transformer blocks (:mod:`hf_drt.targets.selection`).
        config: Settings, or just the schedule's text; the schedule is not read if ``plan`` is given.
        max_steps: Update steps of the run; those of ``plan`` if that is given.
        plan: Resolved phases, in place of ``config.schedule`` and ``max_steps``; needed where a boundary is in epochs
            or an LR anchor: ``Schedule.parse(text).resolve(Run(max_steps, steps_per_epoch, lr))``. Or a
            :class:`hf_drt.planning.ResolvedPlan` on this model, which is not looked through again then. One that is an
            outline holds until :meth:`settle` tells when its phases begin, before the first update step.
        trigger: Adds full-rank windows to a plan of one low-rank phase, as :meth:`observe` sees that they are due;
            that of ``config.schedule`` if no plan is given.
        seed: Seed of new adapter directions where ``config.seed`` is None.
        in_trainer: Whether a Trainer drives it, which alone uses the settings on evaluating, saving and logging.

    Attributes:
        config: The settings, settled for this model (:meth:`hf_drt.DRTConfig.settled`).
        resolved: The plan on this model: phases, with the windows that a trigger has added so far, layers, forms, cost.
        initial: The same, before any window.
        targets: ``(out, in)`` of every layer that changes form, by name.
        copies: How many matrices of that shape it has, and how many multiply a token (:func:`.targets.copies`).
        skipped: Reason of every linear layer that stays as it is, by name.
        fused_note: What share of the parameters stays dense in fused experts, if any does.
        windows: The trigger's checks and decisions (:class:`hf_drt.schedule.windows.Windows`); None without a trigger.
        turns: Which group had its turn, and why (:class:`hf_drt.schedule.turns.Turns`); None where the plan says.
        phase: Index of the phase the model is in; None before the first.
        inputs: What is gathered of layers' inputs before they are truncated, with ``truncation='activation'``.

    Raises:
        ValueError: No target layer, a schedule that does not resolve, a setting that would have no effect, a low-rank
            phase that leaves all layers dense, or a trigger whose plan has another phase or no room for a window.
        TypeError: An argument is of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DRTConfig | str,
        max_steps: int | None = None,
        *,
        plan: Plan | ResolvedPlan | None = None,
        trigger: Trigger | None = None,
        seed: int = 0,
        in_trainer: bool = False,
    ):
        config = DRTConfig.of(config)
        check_arguments(model, max_steps, plan, trigger, seed)
        resolved = resolved_for(model, config, max_steps, plan, trigger)
        self.model, self.config = model, (config := resolved.config)
        self.resolved = self.initial = resolved
        self.targets, self.copies = resolved.targets.shapes, resolved.targets.copies
        self.skipped, self.fused_note = resolved.targets.skipped, resolved.targets.fused_note
        self.seed = config.seed if config.seed is not None else seed
        self.phase: int | None = None
        self._step, self._computing, self.inputs = 0, Computing(), Gathering()
        self._installed: weakref.ref | None = None
        self._copied: tuple[int | None, ...] = ()  # in a copy, the phase in which its optimizer's original was made
        check_resolved(resolved, in_trainer)
        split_attention(model, self.targets)
        self.turns = Turns() if provisional(resolved.plan) != resolved.plan else None
        self.windows: Windows | None = None
        if resolved.trigger is not None:
            limit = budget_of(config, {self.plan.phases[0].kind})
            self.windows = Windows(resolved.trigger, self.plan, limit, self._flops_of)

    # ---- what a phase asks for

    @property
    def plan(self) -> Plan:
        """The phases, with the windows that a trigger has added so far."""
        return self.resolved.plan

    def forms(self, phase: int) -> dict[str, Form]:
        """The form of every target layer in a phase, by name."""
        return self.resolved.forms_by_phase[phase]

    def cost(self) -> PlanCost:
        """What the plan costs relative to dense training of the target layers."""
        return self.resolved.cost

    def _flops_of(self, plan: Plan) -> float:
        return self.initial.with_plan(plan).cost.flops

    def _grow(self, plan: Plan) -> None:
        if plan != self.plan:
            self.resolved = self.resolved.with_plan(plan)

    def settle(self, resolved: ResolvedPlan, resumed: bool = False) -> None:
        """Put in force, before the first update step, when exactly the phases begin.

        Args:
            resolved: Differs from :attr:`resolved` in the beginnings of later phases only.
            resumed: Whether the plan in force is a checkpoint's, which then has to be this one.

        Raises:
            ValueError: The checkpoint's plan is another.
        """
        if resumed:
            check_plan(str(self.plan), self.plan.max_steps, resolved.plan)
        self.resolved = self.initial = resolved

    # ---- what it computes in

    @property
    def dtype(self) -> str | None:
        """What the present phase computes in, 'fp32' or 'bf16'; None for what the run does, and in no phase."""
        return None if self.phase is None else self.plan.phases[self.phase].dtype

    def autocast(self, device: str | None = None) -> AbstractContextManager:
        """The context for forward passes, and losses, of the present phase, in its dtype; around the backward pass none
        is needed.

        Args:
            device: Type of the device, as 'cuda'; that of the model's first parameter by default.
        """
        return self._computing.autocast(self.dtype, device or next(self.model.parameters()).device.type)

    def recasts(self, index: int) -> bool:
        """Whether a phase differs from the present one in its dtype alone: nothing but that changes with it."""
        return self.plan.recasts(self.phase, index)

    # ---- the verbs

    def match(self, step: int) -> bool:
        """Whether the model is in another phase than update ``step`` needs."""
        return self.phase != self.plan.index_at(step)

    def begin_step(
        self,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        probe: Callable[[], Tensor | None] | None = None,
    ) -> Transition | None:
        """:meth:`apply` if a phase begins with this update step, and keep time for the re-warm-up.

        Call it at the beginning of every update step, before the first forward pass. Arguments as in :meth:`apply`.
        """
        warn_of_lone_process()
        check_step(step, self._step)
        self._computing.step_begins(step, None if self.phase is None else self.plan.phases[self.phase], self._step)
        changes, index = self.match(step), self.plan.index_at(step)
        if changes and optimizer is None and self.phase is not None and not self.recasts(index):
            refuse_without_optimizer(self.plan.phases[index], step)
        if optimizer is None and self._installed is None and form_group_options(self.config):
            raise ValueError(
                f"begin_step({step}) got no optimizer, so that {group_settings(self.config)} would have no effect. "
                f"Pass the optimizer, or call drt.install(optimizer) once before.{self.config.without_matrix_optimizer}"
            )
        transition = self.apply(step, optimizer, probe) if changes else None
        self._step = step
        if optimizer is not None and self._is_new(optimizer):
            self.install(optimizer)
        if self.config.truncation == "activation":
            gathered = {name: self._layer(name) for name in gathered_at(self.resolved, step)}
            self.inputs.follow(gathered, engine_of(self.model))
        return transition

    def _is_new(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Whether there is an optimizer that :meth:`install` has not been called with."""
        return optimizer is not None and (self._installed is None or self._installed() is not unwrap(optimizer))

    def observe(self, step: int, loss: Tensor | float | None = None) -> bool:
        """Look, after an update step, whether a full-rank window is due; nothing without a trigger.

        Args:
            step: Updates made so far, this one included.
            loss: Mean training loss of this update; needed for the signal 'loss'. On several processes it must be the
                same on all.

        Returns:
            Whether a window begins with the next update step: :attr:`plan` has grown then.
        """
        whole_number("step", step)
        if self.windows is None:
            return False
        if loss is not None and self.plan.phases[self.plan.index_at(step - 1)].kind != "dense":
            self.windows.add_loss(loss)
        if not self.windows.is_due(self.plan, step):
            return False
        ranks = self.effective_ranks().values()
        before = self.plan
        self._grow(self.windows.check(before, step, sum(ranks) / len(ranks)))
        return self.plan != before

    def apply(
        self,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        probe: Callable[[], Tensor | None] | None = None,
    ) -> Transition:
        """Bring the model into the phase of update ``step``.

        After a ValueError model and optimizer are as they were (:mod:`hf_drt.transition`). Layers that are in the
        phase's form already stay as they are.

        Args:
            step: Update step that is about to be made, 0-based.
            optimizer: The optimizer over the model's trainable parameters, once there is one; Accelerate's wrapper too.
            probe: Gives the model's output on a fixed batch, or None; called before and after, for ``function_error``.
                What it raises is logged, and stops nothing.

        Raises:
            ValueError: The optimizer is not supported or lacks a weight, a weight is not finite, or a layer is gone.
            HalfwayError: Memory has run out, or another process has died, after the first layer had changed.
        """
        started = time.perf_counter()
        index = self.plan.index_at(step)
        self._decide(index)
        split_attention(self.model, self.targets)  # again after to_dense()
        enter = self._staged(optimizer)
        parameters = trainable_size(self.model)
        forms = self.changes(index)
        function = FunctionError(probe if self.match(step) else None)
        generator = partial(self._generator, index)
        moments, inputs = self.config.moments or "reset", self.inputs.taken()
        outcome = change_forms(self.model, forms, optimizer, moments, generator, function.look, inputs)
        self.inputs.drop()
        enter()
        declare(self.model)
        warn_of_rounding(step, outcome.merge_error, self.config.frozen_dtype)
        self.phase, self._step = index, step
        if self.turns is not None and not self.turns.reference:
            self.turns.reference = self.effective_ranks()
        seconds = time.perf_counter() - started
        return Transition(
            step=step,
            phase=index,
            kind=self.plan.phases[index].kind,
            layers=len(forms),
            seconds=seconds,
            parameters=(parameters, trainable_size(self.model)),
            errors=outcome.errors,
            merge_error=outcome.merge_error,
            rounding_error=outcome.rounding_error,
            function_error=function.measure(),
        )

    def _decide(self, index: int) -> None:
        """Whose turn it is in a phase that is about to begin, and in those that are skipped, where the run decides."""
        if self.turns is not None:
            for due in range(index + 1):  # those that were decided stay so
                self._grow(self.turns.decide(self.plan, due, self._needs))

    def _needs(self, count: int) -> dict[int, float]:
        """By what share the effective rank of each group's layers has fallen since the run began, on average."""
        then = self.turns.reference if self.turns is not None else {}
        return mean_falls(then, self.effective_ranks(), self.resolved.groups(count))

    def changes(self, index: int) -> dict[str, Form]:
        """The layers that change, and their new forms, from what the model is in now."""
        restarts = self.resolved.restarts(index, self.phase)
        return {
            name: form
            for name, form in self.forms(index).items()
            if form_of(self._layer(name)) != form or (name in restarts and begins_anew(form))
        }

    def _generator(self, phase: int, name: str) -> torch.Generator:
        """A CPU generator from (seed, phase, layer): equal on all processes, and the global one is left alone."""
        digest = hashlib.sha256(f"{self.seed}/{phase}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def state_dict(self) -> dict[str, Any]:
        """The plan, the phase, the lasting settings, and every target's shape and form; JSON-serialisable."""
        forms = {name: form_of(self._layer(name)) for name in self.targets}
        state = structure(self.plan, self.phase, self._settings(), self.targets, forms, self._made_in())
        state |= {} if self.turns is None else {"turns": self.turns.state_dict()}
        state |= self.resolved.measured
        return state if self.windows is None else state | {"windows": self.windows.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Compare a state with this plan and model.

        Raises:
            ValueError: It belongs to another plan, model, selection or setting; the message names the difference.
        """
        plan = self._plan_of(state)
        check_preset(state, self.config.parsed, self.config.lowrank)
        forms = self.resolved.with_plan(plan).forms_by_phase
        check_structure(state, plan, self._settings(), self.targets, lambda index: forms[index])

    def _plan_of(self, state: dict[str, Any]) -> Plan:
        """The plan that a state must have."""
        grows, turns, now = self.windows is not None, self.turns is not None, self.resolved
        how = {"grows": grows, "turns": turns, "outline": now.outline, "measured": now.paces is not None}
        return continued_plan(state, self.initial.plan, **how) or self.plan

    def _settings(self) -> dict[str, Any]:
        settings = {"seed": self.seed} | lasting(self.config)
        if self.windows is not None:
            settings |= {"schedule": str(self.windows.trigger), "budget": self.windows.limit}
        return settings

    def load_state_dict(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None, *, history: bool = True
    ) -> None:
        """Restore the structure that a state describes; the weights' values are unset until they are loaded.

        Args:
            state: From :meth:`state_dict`.
            optimizer: One over the model in its present form, if it exists; it gets the new parameters in the old ones'
                places, phase by phase as in the run, so that its own state can be loaded afterwards.
            history: Whether the windows that a trigger has added, and its checks, become those of the state too; not
                where the run is over, and only its model goes back.

        Raises:
            ValueError: As in :meth:`check_state`, or the optimizer is not supported or lacks a weight; the model is as
                it was then.
        """
        self.check_state(state)
        self._staged(optimizer)()
        if history:
            self._grow(self._plan_of(state))
        if self.windows is not None and history:
            self.windows.load_state_dict(state.get("windows", {}))
        if self.turns is not None and history:
            self.turns.load_state_dict(state.get("turns", {}))
        if optimizer is not None:
            for index in range(0 if self.phase is None else self.phase + 1, state["phase"]):
                self.empty_phase(index, optimizer)
        self.empty_phase(state["phase"], optimizer, self._plan_of(state))

    def empty_phase(self, index: int, optimizer: torch.optim.Optimizer | None = None, plan: Plan | None = None) -> None:
        """Bring the model into the form of a phase, of :attr:`plan` if none is given, with values unset."""
        if self.phase is not None and index == self.phase + 1:
            changes = self.changes(index)
        else:
            forms = (self.resolved if plan is None else self.resolved.with_plan(plan)).forms_by_phase[index]
            changes = {name: form for name, form in forms.items() if form_of(self._layer(name)) != form}
        empty_forms(self.model, changes, optimizer)
        declare(self.model)
        self.phase, self._step = index, self.plan.phases[index].start
        self._computing.restart()

    def remembered(self) -> Callable[[], None]:
        """The returned function brings the model back to the layers that it has now, bit for bit, and to this phase
        (:func:`hf_drt.transition.remembered_layers`)."""
        phase, step, resolved = self.phase, self._step, self.resolved
        turns = None if self.turns is None else self.turns.state_dict()
        principal = self.config.init != "zero" and any("adapter" in p.kinds for p in self.plan.phases)
        put_back = remembered_layers(self.model, {name: self._layer(name) for name in self.targets}, principal)

        def restore() -> None:
            put_back()
            self.inputs.drop()
            declare(self.model)
            self.phase, self._step, self.resolved = phase, step, resolved
            if self.turns is not None and turns is not None:
                self.turns.load_state_dict(turns)

        return restore

    def _layer(self, name: str) -> nn.Module:
        """The target layer as it is now; as :func:`hf_drt.targets.present_layer`."""
        return present_layer(self.model, name, self.targets[name])

    # ---- around the optimizer step

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer is supported, give it its form groups, and hook the step rules on it.

        Needed only if a learning-rate scheduler is made before the first :meth:`begin_step`, and then before it.

        Raises:
            ValueError: The optimizer is not supported, or lacks a weight.
        """
        optimizer = unwrap(optimizer)
        install(optimizer, self._owner(), self.config, {name: self._layer(name) for name in self.targets})
        self._installed = weakref.ref(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, by pickle or deepcopy: its optimizer is another, which has no step rules before the next step, and
        was made when the original's was."""
        return vars(self) | {"_installed": None, "_copied": () if self._installed is None else (self._made_in(),)}

    def _made_in(self) -> int | None:
        """The phase that the model was in when its optimizer was made."""
        if self._installed is None and self._copied:
            return self._copied[0]
        return optimizer_made_in(self._installed and self._installed(), self.model, self.targets)

    def _owner(self) -> Owner:
        rewarms = bool(self.config.rewarmup_steps) and (len(self.plan) > 1 or self.windows is not None)
        scales = bool(form_group_options(self.config))
        made_in = self._copied[0] if self._copied else self.phase
        without = self.config.without_matrix_optimizer
        return Owner.of(self.model, self.targets, self.lr_factor, rewarms, scales, made_in, without)

    def _staged(self, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
        """Check an optimizer that is new before anything changes; the function returned makes this an owner of it."""
        if optimizer is None or not self._is_new(optimizer):
            return lambda: None
        return staged(unwrap(optimizer), self._owner(), self.config)[0]

    def lr_factor(self) -> float:
        """Share of the scheduled LR in force at the present update step: the re-warm-up after a switch."""
        start = self.plan.form_start(self.phase) if self.phase else 0
        since = self._step - start if start else None
        return rewarmup_factor(since, self.config.rewarmup_steps, self.config.rewarmup_start)

    # ---- reading and leaving

    def effective_ranks(self) -> dict[str, float]:
        """Effective rank of every target layer, of fused experts their mean; factored ones from r x r matrices only.
        Collective under FSDP2."""
        engine = engine_of(self.model)
        return layer_ranks((name, engine.whole(self._layer(name))) for name in self.targets)

    @property
    def is_dense(self) -> bool:
        """Whether every target layer is dense, and trained."""
        return all(form_of(self._layer(name)) == Dense() for name in self.targets)

    def to_dense(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Bring every target layer back to its dense form: a plain model, that loads anywhere. Without an optimizer
        split attention becomes ``nn.MultiheadAttention`` again.

        Args:
            optimizer: Where it is to go on with this model; the new weights take the old ones' places in it.
        """
        low_rank: dict[str, Form] = {name: Dense() for name in self.targets if form_of(self._layer(name)) != Dense()}
        change_forms(self.model, low_rank, optimizer, "reset", lambda name: self._generator(0, name))
        if optimizer is None:
            join_attention(self.model)
        declare(self.model)
        self.phase = None
