"""A plan on many processes: memory, bytes and seconds of every phase, and every switch."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_drt.controller import DynamicRank
from hf_drt.forms import Dense, Form, form_of, layer_of
from hf_drt.simulate.optimizer import optimizer_bytes
from hf_drt.simulate.processes.inventory import Inventory, inventory
from hf_drt.simulate.processes.layouts import Held, Layout, fewer
from hf_drt.simulate.processes.links import Machine
from hf_drt.simulate.processes.ring import KINDS, Collective
from hf_drt.simulate.processes.switching import Switch, jobs_of, switch
from hf_drt.simulate.step import StepCost
from hf_drt.transition import empty_forms


@dataclass(frozen=True)
class PhaseOnProcesses:
    """An update step of a phase, of one of the processes.

    Attributes:
        held: Bytes that it holds.
        optimizer: Bytes of its optimizer's state.
        activations: Bytes that the forward pass of its micro-batch keeps.
        peak: At most so many bytes are alive at one time: the sum, or less where that is known.
        sent: Bytes that it sends, by kind of collective.
        communication, compute: Seconds of either, one after the other.
    """

    form: str
    held: Held
    optimizer: int
    activations: int
    peak: int
    sent: dict[str, float]
    communication: float
    compute: float

    @property
    def total(self) -> float:
        """Bytes that a process sends."""
        return sum(self.sent.values())

    @property
    def ratio(self) -> float:
        """Seconds of communication over those of compute: above 1 it cannot hide behind the compute."""
        return self.communication / self.compute


@dataclass(frozen=True)
class OnProcesses:
    """A run on many processes.

    Attributes:
        phases: In order; ``dense`` is dense training.
        switches: Into every phase, on 1, 8, 64, ... processes and all. The first is that of a dense model as training
            begins.
    """

    layout: Layout
    machine: Machine
    phases: tuple[PhaseOnProcesses, ...]
    dense: PhaseOnProcesses
    switches: tuple[tuple[Switch, ...], ...]


def on_processes(
    controller: DynamicRank,
    steps: Sequence[StepCost],
    dense: StepCost,
    layout: Layout,
    machine: Machine,
    *,
    optimizer: str,
    accumulation: int,
    dtype: str,
) -> OnProcesses:
    """What a run takes on many processes.

    Args:
        controller: Plan and model; the model is dense, on the meta device, and in the dtype that weights are kept in.
            It is so again afterwards.
        steps: An update step of every phase, on one process with its micro-batch; ``dense`` of dense training.
        layout: Engine and processes.
        machine: Speeds of chips and links.
        optimizer: A value of ``optim`` in TrainingArguments.
        accumulation: Forward passes per update step.
        dtype: Of the products of training: 'float32' or 'bfloat16'.

    Raises:
        ValueError: The machine has no speed of products in this dtype; or as :func:`hf_drt.simulate.optimizer_bytes`.
    """
    made = _Maker(layout, machine, optimizer, accumulation, dtype)
    model, names = controller.model, [phase.name for phase in controller.plan.phases]
    have = inventory(model)
    reference = made.phase("dense", have, dense)
    phases, switches, state = [], [], reference.optimizer
    try:
        for index, (form, step) in enumerate(zip(names, steps, strict=True)):
            changes = controller.changes(index)
            jobs, before = jobs_of(model, changes, have), have
            empty_forms(model, changes)
            controller.phase = index
            have = inventory(model)
            kept = made.state_ratio(before, state) if controller.config.moments == "project" else 0.0
            switches.append(
                tuple(switch(jobs, have, fewer(layout, n), machine, "float32", kept) for n in _counts(layout))
            )
            phases.append(made.phase(form, have, step))
            state = phases[-1].optimizer
    finally:
        controller.phase = None
        plain: dict[str, Form] = {
            name: Dense() for name in controller.targets if form_of(layer_of(model, name)) != Dense()
        }
        empty_forms(model, plain)
    return OnProcesses(layout, machine, tuple(phases), reference, tuple(switches))


def _counts(layout: Layout) -> list[int]:
    """1, 8, 64, ... processes, and all; of replicas whole ones."""
    below = [8**k for k in range(12) if 8**k < layout.count]
    shards = layout.shards
    return [n for n in below if n <= shards or n % shards == 0] + [layout.count]


@dataclass(frozen=True)
class _Maker:
    """What all phases have in common."""

    layout: Layout
    machine: Machine
    optimizer: str
    accumulation: int
    dtype: str

    def phase(self, form: str, have: Inventory, step: StepCost) -> PhaseOnProcesses:
        held = self.layout.held(have, self.accumulation)
        if self.layout.whole_state:  # as on one process, whose peak is known
            state, peak = step.optimizer, step.peak + held.sending
        else:
            state, _ = optimizer_bytes(self.optimizer, self.layout.state_of(have))
            peak = held.weights + held.gradients + held.gathered + held.sending + state + step.activations
        sends = self.layout.update(have, self.accumulation, self.machine)
        return PhaseOnProcesses(
            form,
            held,
            state,
            step.activations,
            peak,
            {kind: sum(c.sent for c in sends if c.kind == kind) for kind in KINDS},
            _seconds(sends),
            self.machine.compute(step.flops, self.dtype),
        )

    def state_ratio(self, have: Inventory, state: int) -> float:
        """Bytes of the optimizer's state over those of the trainable weights, of a process."""
        weights = sum(p.numel() * p.element_size() for p in self.layout.state_of(have))
        return state / weights if weights else 0.0


def _seconds(sends: Sequence[Collective]) -> float:
    return sum(send.seconds for send in sends)
