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
    decompose,
    effective_weight,
    form_of,
    parameters_of,
    stack_count,
    weight_shape,
)
from hf_drt.linalg import (
    Truncation,
    factored_singular_values,
    fisher_truncation,
    fisher_values,
    input_root,
    singular_values,
    truncation_error,
    weighted_values,
)


@dataclass(frozen=True)
class TargetLayer:
    """A target layer by its numbers.

    Attributes:
        form: The form that it is in.
        whole: The cheapest form without any error.
        values: Singular values of the effective W, descending; with calibration those of ``W S``, with ``S S^T`` the
            second moments of its inputs (:func:`hf_drt.linalg.input_root`); where harm counts those of ``L^T W S``
            (:func:`hf_drt.linalg.fisher_values`). Of fused experts, which share a rank, the root of the sum of squares
            over the experts.
        scale: Half the sum of squares of values that are left out, times this, is the estimated rise of the loss; None
            where harm does not count.
    """

    name: str
    shape: LayerShape
    form: Form
    whole: Form
    values: Tensor
    scale: float | None = None

    def at(self, rank: int) -> Form:
        """Factors of this rank, if that saves anything."""
        return Factored(rank) if stored(Factored(rank), self.shape) < stored(self.whole, self.shape) else self.whole

    def error(self, form: Form) -> float:
        """Relative Frobenius error."""
        return truncation_error(self.values, form.rank) if isinstance(form, Factored) and form != self.whole else 0.0

    def harm(self, form: Form) -> float:
        """Estimated rise of the loss."""
        if self.scale is None or not isinstance(form, Factored) or form == self.whole:
            return 0.0
        return 0.5 * self.scale * self.values[form.rank :].double().square().sum().item()

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
        values, scale = _spectrum(module, C, G)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    whole = form if isinstance(form, Factored) and stored(form, shape) < stored(Dense(), shape) else Dense()
    return TargetLayer(name, shape, form, whole, values, scale)


def _spectrum(module: nn.Module, C: Tensor | None, G: Tensor | None) -> tuple[Tensor, float | None]:
    if stack_count(module) is not None:
        matrices = effective_weight(module)
        each = [_of_matrix(W, *moments) for W, moments in zip(matrices, _by_expert(len(matrices), C, G), strict=True)]
        squares = [(1.0 if C is None else scale) * values.double().square() for values, scale in each]
        return torch.stack(squares).sum(0).sqrt(), None if G is None else 1.0
    if isinstance(module, FactoredLinear) and G is None:
        L, R, _ = module.pair()
        S = None if C is None else input_root(C)
        return factored_singular_values(L, R if S is None else R.detach() @ S.to(R)), None
    values, scale = _of_matrix(effective_weight(module), C, G)
    return values, None if G is None else scale


def _by_expert(count: int, C: Tensor | None, G: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
    return [(None if C is None else C[e], None if G is None else G[e]) for e in range(count)]


def _of_matrix(W: Tensor, C: Tensor | None, G: Tensor | None) -> tuple[Tensor, float]:
    """Singular values, for moments with a mean diagonal of 1, and what their squares have to be multiplied with."""
    if C is None:
        return singular_values(W), 1.0
    if G is None:
        return weighted_values(W, C), _mean_of(C)
    return fisher_values(W, C, G), _mean_of(C) * _mean_of(G)


def _mean_of(C: Tensor) -> float:
    """What :func:`hf_drt.linalg.shrunk` divides by."""
    return C.diagonal().double().mean().item()


def truncated_parts(module: nn.Module, form: Form, C: Tensor | None, G: Tensor | None) -> tuple[Tensor, ...] | None:
    """What :func:`hf_drt.forms.prepare` takes, of a truncation weighed by what is given."""
    if C is None or G is None or not isinstance(form, Factored):
        return decompose(module, form, C)
    W = effective_weight(module)
    if W.ndim == 2:
        return fisher_truncation(W, C, G, form.rank)
    parts = [fisher_truncation(*each, form.rank) for each in zip(W, C, G, strict=True)]
    U, S, Vh, error = (torch.stack(kind) for kind in zip(*parts, strict=True))
    return Truncation(U, S, Vh, error.mean())
