"""A target layer by its numbers: which forms it may take, and what each costs, loses and harms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_drt.compress.result import LayerCompression
from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    FactoredLinear,
    Form,
    LayerShape,
    effective_weight,
    form_of,
    parameters_of,
    stack_count,
    weight_shape,
)
from hf_drt.linalg import (
    factored_singular_values,
    input_root,
    singular_values,
    truncation_error,
    weighted_directions,
)


@dataclass(frozen=True)
class TargetLayer:
    """A target layer by its numbers.

    Attributes:
        form: The form that it is in.
        whole: The cheapest form without any error.
        values: Singular values of the effective W, descending; with calibration those of ``W S``, with ``S S^T`` the
            second moments of its inputs (:func:`hf_drt.linalg.input_root`). Of fused experts, which share a rank, the
            root of the sum of squares over the experts.
        harms: By how much the loss is estimated to rise for each of them that is left out; None where that was not
            asked for.
    """

    name: str
    shape: LayerShape
    form: Form
    whole: Form
    values: Tensor
    harms: Tensor | None = None

    def at(self, rank: int) -> Form:
        """Factors of this rank, if that saves anything."""
        return Factored(rank) if stored(Factored(rank), self.shape) < stored(self.whole, self.shape) else self.whole

    def error(self, form: Form) -> float:
        """Relative Frobenius error."""
        return truncation_error(self.values, form.rank) if isinstance(form, Factored) and form != self.whole else 0.0

    def harm(self, form: Form) -> float:
        """Estimated rise of the loss."""
        if self.harms is None or not isinstance(form, Factored) or form == self.whole:
            return 0.0
        return self.harms[form.rank :].sum().item()

    def options(self, multiple: int) -> list[Form]:
        """The forms a budget may choose from, cost rising."""
        ranks = range(multiple, min(self.shape), multiple)
        return [form for form in map(self.at, ranks) if form != self.whole] + [self.whole]

    def result(self, form: Form) -> LayerCompression:
        """The layer in a form."""
        before_after = stored(self.form, self.shape), stored(form, self.shape)
        return LayerCompression(self.name, self.shape, form, self.error(form), before_after)


def stored(form: Form, shape: LayerShape) -> int:
    """Weights that a layer holds, bias aside; of fused experts those of all."""
    return (shape.experts or 1) * (parameters_of(form, shape) + (math.prod(shape) if isinstance(form, Adapter) else 0))


def measured_layer(name: str, module: nn.Module, C: Tensor | None = None, G: Tensor | None = None) -> TargetLayer:
    """A layer's numbers.

    Args:
        C, G: Second moments of its inputs and of the loss's gradients at its outputs, of fused experts ``(E, ., .)``
            each; None to weigh nothing by them.

    Raises:
        ValueError: Its weight, or C, holds inf or nan.
    """
    form, shape = form_of(module), weight_shape(module)
    try:
        values, harms = _spectrum(module, C, G)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    whole = form if isinstance(form, Factored) and stored(form, shape) < stored(Dense(), shape) else Dense()
    return TargetLayer(name, shape, form, whole, values, harms)


def _spectrum(module: nn.Module, C: Tensor | None, G: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if stack_count(module) is not None:
        matrices = effective_weight(module)
        experts = range(len(matrices))
        each = [_of_matrix(matrices[e], None if C is None else C[e], None if G is None else G[e]) for e in experts]
        scales = [1.0 if C is None else _mean_of(C[e]) for e in experts]
        values = sum(scale * v.double().square() for scale, (v, _) in zip(scales, each, strict=True))
        harms = [own for _, own in each if own is not None]
        return torch.as_tensor(values).sqrt(), torch.stack(harms).sum(0) if harms else None
    if isinstance(module, FactoredLinear) and G is None:
        L, R, _ = module.pair()
        S = None if C is None else input_root(C)
        return factored_singular_values(L, R if S is None else R.detach() @ S.to(R)), None
    return _of_matrix(effective_weight(module), C, G)


def _of_matrix(W: Tensor, C: Tensor | None, G: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Singular values of ``W S``; and of each direction u of the outputs the harm, ``1/2 sigma^2 u^T G u`` for the
    inputs' true scale: a truncation to rank r leaves out ``u u^T W`` of all but the first r."""
    if C is None:
        return singular_values(W), None
    U, values = weighted_directions(W, C)
    if G is None:
        return values, None
    curvature = (U * (G.to(U) @ U)).sum(0).double().clamp_min(0)
    return values, (0.5 * _mean_of(C) * values.double().square() * curvature).cpu()


def _mean_of(C: Tensor) -> float:
    """What :func:`hf_drt.linalg.shrunk` divides by."""
    return C.diagonal().double().mean().item()
