"""What a plan costs before it runs, from shapes alone: trainable parameters and multiply-adds of the target layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_drt.forms import Dense, Form, LayerShape, flops_of, forward_of, parameters_of
from hf_drt.schedule import Plan


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase relative to all target layers being dense.

    Attributes:
        steps: Update steps.
        parameters: Trainable parameters over out * in, summed over the layers.
        flops: Multiply-adds per token of forward and backward over 3 * out * in: 1 for dense, r (m + n) / (m n) for
            factors, 2/3 + r (m + n) / (m n) for an adapter.
        forward: Multiply-adds per token of the forward product over out * in: 1 for dense, r (m + n) / (m n) for
            factors, and 1 + r (m + n) / (m n) for an adapter, which is never cheaper than dense there.
        changed: Layers whose form, or rank, is another than in the phase before; of the first phase 0.
    """

    steps: int
    parameters: float
    flops: float
    forward: float
    changed: int


@dataclass(frozen=True)
class PlanCost:
    """Cost of a plan, by phase and on average over its update steps."""

    phases: tuple[PhaseCost, ...]

    @property
    def parameters(self) -> float:
        """Average share of trainable parameters."""
        return self._average("parameters")

    @property
    def flops(self) -> float:
        """Average share of multiply-adds."""
        return self._average("flops")

    @property
    def forward(self) -> float:
        """Average share of multiply-adds of the forward pass."""
        return self._average("forward")

    @property
    def switches(self) -> int:
        """Changes of phase in which a layer gets another form or rank."""
        return sum(phase.changed > 0 for phase in self.phases)

    def _average(self, name: str) -> float:
        return sum(getattr(p, name) * p.steps for p in self.phases) / sum(p.steps for p in self.phases)


def relative_flops(
    shapes: Sequence[LayerShape], forms: Sequence[Form], copies: Sequence[tuple[int, int]] | None = None
) -> float:
    """Multiply-adds of layers of shapes ``(out, in)`` in some forms over those of the same layers in dense form.

    Every layer is counted for one token, and a convolution for one output position; how many positions it has is not
    known here (:mod:`hf_drt.simulate` knows). ``copies`` as in :func:`plan_cost`: of E experts a token meets k, so that
    they count k times, not E times.
    """
    return _relative(flops_of, shapes, forms, copies)


def _relative(
    cost_of: Callable[[Form, LayerShape], int],
    shapes: Sequence[LayerShape],
    forms: Sequence[Form],
    copies: Sequence[tuple[int, int]] | None,
) -> float:
    per_token = [active for _, active in copies] if copies is not None else [1] * len(shapes)
    dense = sum(k * cost_of(Dense(), shape) for k, shape in zip(per_token, shapes, strict=True))
    return sum(k * cost_of(form, shape) for k, form, shape in zip(per_token, forms, shapes, strict=True)) / dense


def plan_cost(
    plan: Plan,
    shapes: Sequence[LayerShape],
    forms: Sequence[Sequence[Form]],
    copies: Sequence[tuple[int, int]] | None = None,
) -> PlanCost:
    """Cost of a plan.

    Args:
        plan: Resolved phases.
        shapes: ``(out, in)`` of every target layer.
        forms: For every phase the form of every layer, in the order of ``shapes``.
        copies: How many matrices of its shape each layer holds, and by how many of them a token is multiplied; one and
            one for linear layers, E and the experts per token for fused experts. None if all are linear layers.
    """
    counts = [count for count, _ in copies] if copies is not None else [1] * len(shapes)
    dense_parameters = sum(n * Dense().parameters(*shape) for n, shape in zip(counts, shapes, strict=True))
    changed = [0, *(sum(a != b for a, b in zip(*two, strict=True)) for two in pairwise(forms))]
    return PlanCost(
        tuple(
            PhaseCost(
                plan.end_of(index) - phase.start,
                sum(n * parameters_of(f, shape) for n, f, shape in zip(counts, forms[index], shapes, strict=True))
                / dense_parameters,
                relative_flops(shapes, forms[index], copies),
                _relative(forward_of, shapes, forms[index], copies),
                changed[index],
            )
            for index, phase in enumerate(plan.phases)
        )
    )
