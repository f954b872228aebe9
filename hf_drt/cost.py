"""What a plan costs before it runs, from shapes alone: trainable parameters and multiply-adds of the target layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_drt.forms import Dense, Form, flops_of, parameters_of
from hf_drt.schedule import Plan


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase relative to all target layers being dense.

    Attributes:
        steps: Update steps.
        parameters: Trainable parameters over out * in, summed over the layers.
        flops: Multiply-adds per token of forward and backward over 3 * out * in: 1 for dense, r (m + n) / (m n) for
            factors, 2/3 + r (m + n) / (m n) for an adapter.
    """

    steps: int
    parameters: float
    flops: float


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

    def _average(self, name: str) -> float:
        return sum(getattr(p, name) * p.steps for p in self.phases) / sum(p.steps for p in self.phases)


def relative_flops(shapes: Sequence[tuple[int, int]], forms: Sequence[Form]) -> float:
    """Multiply-adds of layers of shapes ``(out, in)`` in some forms over those of the same layers in dense form.

    Every layer is counted for one token, and a convolution for one output position; how many positions it has is not
    known here (:mod:`hf_drt.estimate` knows).
    """
    dense = sum(flops_of(Dense(), shape) for shape in shapes)
    return sum(flops_of(form, shape) for form, shape in zip(forms, shapes, strict=True)) / dense


def plan_cost(plan: Plan, shapes: Sequence[tuple[int, int]], forms: Sequence[Sequence[Form]]) -> PlanCost:
    """Cost of a plan.

    Args:
        plan: Resolved phases.
        shapes: ``(out, in)`` of every target layer.
        forms: For every phase the form of every layer, in the order of ``shapes``.
    """
    dense_parameters = sum(Dense().parameters(*shape) for shape in shapes)
    return PlanCost(
        tuple(
            PhaseCost(
                plan.end_of(index) - phase.start,
                sum(parameters_of(form, shape) for form, shape in zip(forms[index], shapes, strict=True))
                / dense_parameters,
                relative_flops(shapes, forms[index]),
            )
            for index, phase in enumerate(plan.phases)
        )
    )
