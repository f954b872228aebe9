"""A whole run: every phase of a plan as a simulated step, its cost against dense training, and what to beware of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from hf_drt.controller import DynamicRank
from hf_drt.forms import Adapter, Dense, Factored, Form, LayerShape, begins_anew, flops_of, parameters_of
from hf_drt.optim import maker
from hf_drt.planning import break_even_of, stays_dense, update_multiply_adds
from hf_drt.schedule import LOW_RANK
from hf_drt.simulate.batch import BatchSpec
from hf_drt.simulate.step import StepCost
from hf_drt.simulate.step_costs import StepCosts


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase.

    Attributes:
        kind: Form of the target layers.
        form: As the plan has it: ``dense[2/8]+frozen[1/8]`` where groups of layers change.
        start, end: Update steps ``[start, end)``.
        ranks: Smallest and largest rank of a target layer; None where all are dense.
        step: Cost of each of its update steps.
        update_flops: FLOPs of each update of the matrix optimizer, which ``step`` does not count; 0 without one.
    """

    kind: str
    start: int
    end: int
    ranks: tuple[int, int] | None
    step: StepCost
    update_flops: int = 0
    form: str = ""

    @property
    def steps(self) -> int:
        """Update steps."""
        return self.end - self.start


@dataclass(frozen=True)
class LayerEstimate:
    """One target layer.

    Attributes:
        shape: ``(out, in)``.
        break_even: Rank at which factors cost as much as W, ``out in / (out + in)``.
        rows: Vectors that it multiplies in an update step's forward passes.
        forms: In every phase.
    """

    name: str
    shape: LayerShape
    break_even: float
    rows: int
    forms: tuple[Form, ...]

    def share(self, phase: int) -> float:
        """FLOPs in a phase over those of the dense layer."""
        return flops_of(self.forms[phase], self.shape) / flops_of(Dense(), self.shape)


@dataclass(frozen=True)
class RunEstimate:
    """A run of a model by a plan.

    Attributes:
        phases: In order.
        dense: An update step of dense training with the same optimizers, and without the settings on memory of
            activations, to compare with.
        layers: The target layers.
        switch_extra: Bytes that a switch may need beyond the larger of its two phases: one layer's weight, gradient and
            optimizer state, at most; under an optimizer that evaluates at averages also a copy of all weights that
            change.
        warnings: What costs more than it saves.
    """

    phases: tuple[PhaseEstimate, ...]
    dense: StepCost
    layers: tuple[LayerEstimate, ...]
    switch_extra: int
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Update steps of the run."""
        return self.phases[-1].end

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return sum(phase.steps * phase.step.flops for phase in self.phases)

    @property
    def share(self) -> float:
        """FLOPs of the whole run over those of dense training."""
        return self.flops / (self.steps * self.dense.flops)

    @property
    def trainable(self) -> float:
        """Trainable parameters, averaged over the update steps, over those of dense training."""
        return sum(phase.steps * phase.step.trainable for phase in self.phases) / (self.steps * self.dense.trainable)

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(phase.step.peak for phase in self.phases)

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and the optimizer's state in the phase in which they are most."""
        return max(phase.step.held for phase in self.phases)


def estimate_run(
    controller: DynamicRank,
    batch: BatchSpec,
    *,
    optimizer: str = "adamw_torch",
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    tick: Callable[[], None] = lambda: None,
) -> RunEstimate:
    """What a run costs.

    Args:
        controller: Plan and model; the model is dense and on the meta device, and is so again afterwards.
        batch, optimizer, accumulation, autocast: As in :func:`hf_drt.simulate.simulate_step`.
        tick: Called after each simulated step, of which there are as many as different phases, and one.

    Raises:
        SimulationError, ValueError: As :class:`hf_drt.simulate.StepCosts`.
    """
    rule, _ = maker(optimizer)
    by_phase = [controller.forms(index) for index in range(len(controller.plan))]
    with StepCosts(controller, batch, optimizer, accumulation, autocast, tick) as costs:
        dense = costs.dense()
        phases = tuple(_phase(controller, index, forms, costs.of(index)) for index, forms in enumerate(by_phase))
    layers = tuple(_layer_estimates(controller, dense, by_phase))
    warnings = [controller.fused_note] if controller.fused_note else []
    warnings += _warnings(phases, layers, dense, controller)
    extra = _switch_extra(controller, dense) + (_copies(controller, by_phase) if rule.averages else 0)
    return RunEstimate(phases, dense, layers, extra, tuple(warnings))


def _layer_estimates(
    controller: DynamicRank, dense: StepCost, by_phase: list[dict[str, Form]]
) -> Iterator[LayerEstimate]:
    for name, shape in controller.targets.items():
        break_even = break_even_of(shape, controller.config.decomposition)
        yield LayerEstimate(name, shape, break_even, dense.rows[name], tuple(forms[name] for forms in by_phase))


def _phase(controller: DynamicRank, index: int, forms: dict[str, Form], step: StepCost) -> PhaseEstimate:
    plan = controller.plan
    ranks = [form.rank for form in forms.values() if not isinstance(form, Dense)]
    span = (min(ranks), max(ranks)) if ranks else None
    update = _update_flops(controller, forms)
    phase, end = plan.phases[index], plan.end_of(index)
    return PhaseEstimate(phase.kind, phase.start, end, span, step, update, phase.name)


def _update_flops(controller: DynamicRank, forms: dict[str, Form]) -> int:
    """Of the matrix optimizer."""
    if not controller.config.uses_matrix_optimizer:
        return 0
    return 2 * sum(
        controller.copies[name][0] * update_multiply_adds(forms[name], shape)
        for name, shape in controller.targets.items()
    )


def _switch_extra(controller: DynamicRank, dense: StepCost) -> int:
    """The largest layer with gradient and state; decompositions are in float32 or better."""
    sizes = (controller.copies[name][0] * d_out * d_in for name, (d_out, d_in) in controller.targets.items())
    largest = max(sizes)
    item = max(p.element_size() for p in controller.model.parameters())
    matrices = controller.config.uses_matrix_optimizer
    state = item if matrices else dense.optimizer * item // max(1, dense.gradients)
    return largest * (max(4, item) + item + state)


def _copies(controller: DynamicRank, by_phase: list[dict[str, Form]]) -> int:
    """Of the trainable weights that the largest switch changes (:func:`hf_drt.optim.at_averages`)."""
    item = max(p.element_size() for p in controller.model.parameters())
    return item * max((sum(_changing(controller, *forms)) for forms in pairwise(by_phase)), default=0)


def _changing(controller: DynamicRank, now: dict[str, Form], then: dict[str, Form]) -> Iterator[int]:
    """Trainable weights of each layer that changes form, or begins its form anew."""
    for name, shape in controller.targets.items():
        if now[name] != then[name] or begins_anew(then[name]):
            yield controller.copies[name][0] * parameters_of(now[name], shape)


def _warnings(
    phases: tuple[PhaseEstimate, ...], layers: tuple[LayerEstimate, ...], dense: StepCost, controller: DynamicRank
) -> list[str]:
    found, config = [], controller.config
    for index, phase in enumerate(phases):
        title, parts = f"phase {index} ({phase.form})", controller.resolved.parts(index)
        asked = [layer for layer in layers if layer.name in parts and parts[layer.name].kind in LOW_RANK]
        kept = [layer for layer in asked if stays_dense(parts[layer.name].kind, layer.name, config)]
        found += [f"{title}: {len(kept)} query and key projections stay dense (dense_query_key)"] if kept else []
        stays = [layer for layer in asked if layer.forms[index] == Dense() and layer not in kept]
        found += [f"{title}: {_layers(stays)} stay dense: the rank reaches break-even"] if stays else []
        dearer = [layer for layer in layers if isinstance(layer.forms[index], Adapter) and layer.share(index) > 1]
        if dearer:
            worst = max(layer.share(index) for layer in dearer)
            found.append(
                f"{title}: {_layers(dearer)} cost more FLOPs than dense (up to x {worst:.2f}), as adapters do above a "
                "third of break-even"
            )
        idle = [layer for layer in layers if isinstance(layer.forms[index], Factored) and layer.share(index) > 0.9]
        found += [f"{title}: {_layers(idle)} save less than a tenth: near break-even"] if idle else []
        if phase.kind != "dense" and phase.step.flops >= dense.flops and not dearer:
            found.append(f"{title}: an update step takes as many FLOPs as a dense one, or more")
        if phase.step.peak > dense.peak:
            found.append(f"{title}: the peak of memory is above that of dense training")
    return found


def _layers(layers: list[LayerEstimate]) -> str:
    """How many, and the first with its rank of break-even."""
    first = layers[0]
    plural = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
    return f"{plural} (e.g. {first.name}, {first.shape[0]} x {first.shape[1]}, break-even {first.break_even:.4g})"
