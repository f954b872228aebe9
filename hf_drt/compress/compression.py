"""A trained model's layers as factors, for a smaller and faster model: truncated where their spectrum allows it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.checkpoint import declare
from hf_drt.compress.allocation import Curve, allocate
from hf_drt.config import DRTConfig
from hf_drt.covariance import covariances_of
from hf_drt.forms import (
    Adapter,
    Conversion,
    Dense,
    Factored,
    FactoredLinear,
    Form,
    LayerShape,
    decompose,
    effective_weight,
    form_of,
    layer_of,
    parameters_of,
    prepare,
    stack_count,
    weight_shape,
)
from hf_drt.linalg import factored_singular_values, input_root, singular_values, truncation_error
from hf_drt.planning import resolve_rank
from hf_drt.tables import plain_table
from hf_drt.targets import attention_split, find_targets, split_attention
from hf_drt.transition import exchange_layers


@dataclass(frozen=True)
class LayerCompression:
    """What becomes of one layer.

    Attributes:
        shape: ``(out, in)``.
        form: Factored, or Dense where factors would save nothing.
        error: Relative Frobenius error of the effective weight, ``||W_r - W||_F / ||W||_F``; with calibration that of
            the outputs over its inputs, ``||(W_r - W) C^(1/2)||_F / ||W C^(1/2)||_F`` with C as in
            :func:`hf_drt.linalg.shrunk`.
        parameters: Stored weights before and after, bias aside.
    """

    name: str
    shape: tuple[int, int]
    form: Form
    error: float
    parameters: tuple[int, int]

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for a dense layer."""
        return self.form.rank if isinstance(self.form, Factored) else None


@dataclass(frozen=True)
class Compression:
    """What a compression does, or has done; ``str()`` is a table.

    Attributes:
        criterion: What decided the ranks, such as 'energy=0.9'.
        layers: The target layers in the model's order.
        model_parameters: Of the whole model, before and after.
        loss: What ``evaluate`` gave before and after; None where nothing was evaluated.
        calibrated: Whether the inputs of calibration batches weigh the errors.
    """

    criterion: str
    layers: tuple[LayerCompression, ...]
    model_parameters: tuple[int, int]
    loss: tuple[float, float] | None = None
    calibrated: bool = False

    @property
    def parameters(self) -> tuple[int, int]:
        """Stored weights of the target layers, before and after."""
        before, after = (sum(layer.parameters[side] for layer in self.layers) for side in (0, 1))
        return before, after

    @property
    def flops(self) -> float:
        """Multiply-adds per token of the target layers' forward pass, after over before.

        A linear layer does one per stored weight, so this is the share of parameters too.
        """
        before, after = self.parameters
        return after / before

    @property
    def squared_error(self) -> float:
        """Sum over the layers of the squared relative error: what a budget minimises."""
        return sum(layer.error**2 for layer in self.layers)

    @property
    def loss_difference(self) -> float | None:
        """What it costs: ``evaluate`` after minus before."""
        return None if self.loss is None else self.loss[1] - self.loss[0]

    def __str__(self) -> str:
        columns = ("layer", "out x in", "rank", "error", "before", "after", "share")
        factored = sum(layer.rank is not None for layer in self.layers)
        weighed = ", errors of outputs on the calibration" if self.calibrated else ""
        lines = [
            f"compression by {self.criterion}: {factored} of {len(self.layers)} layers in factors{weighed}",
            plain_table(columns, [_row(layer) for layer in self.layers]),
            f"target layers: {_change(*self.parameters)}; forward FLOPs x {self.flops:.3f}",
            f"whole model: {_change(*self.model_parameters)}",
        ]
        if self.loss is not None:
            lines.append(f"loss: {self.loss[0]:.4f} -> {self.loss[1]:.4f} ({self.loss_difference:+.4f})")
        return "\n".join(lines)


def _row(layer: LayerCompression) -> tuple[str, ...]:
    before, after = layer.parameters
    rank = "dense" if layer.rank is None else str(layer.rank)
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return layer.name, shape, rank, f"{layer.error:.4f}", f"{before:,}", f"{after:,}", f"{after / before:.3f}"


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} parameters ({after / before:.3f})"


def compress(
    model: nn.Module,
    *,
    rank: int | None = None,
    rank_ratio: float | None = None,
    energy: float | None = None,
    parameters: float | None = None,
    rank_multiple: int = 8,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    blocks: list[str] | None = None,
    ignore_source: list[str] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] | None = None,
) -> Compression:
    """Re-factor the linear layers of a trained model in place, by exactly one criterion.

    Each layer's W becomes ``U V`` of a lower rank, the best there is in the Frobenius norm. A layer stays dense where
    factors would hold as many parameters, i.e. from rank ``out in / (out + in)`` on. The model may be in any mix of
    forms: factored layers go on to a lower rank or stay as they are, adapters are merged. The factors are trainable:
    fine-tuning regains some of the loss.

    The weights of a model that was trained densely have no low rank, and cutting them costs more than the errors in the
    table suggest. Look at ``evaluate``'s difference before you use the result.

    Args:
        model: With transformer blocks (:mod:`hf_drt.targets.selection`).
        rank: The same rank for all layers, at least 1.
        rank_ratio: Rank as a share of min(out, in), in (0, 1].
        energy: Share of each layer's ``||W||_F^2`` to keep, in (0, 1]; the smallest rank that does.
        parameters: Budget for the stored weights of all target layers together: a number with a decimal point in (0, 1)
            is a share of their dense ``out in``, a whole number an absolute count. It is shared out so that the summed
            squared relative error is small (:func:`.allocation.allocate`), and no larger than that of any
            ``rank_ratio`` within the budget. The error is relative, since a factor on W that a norm or a neighbour
            takes back must not change the ranks.
        rank_multiple: Ranks that are not given as ``rank`` are multiples of this, at least 1.
        include, exclude, blocks, ignore_source: Which layers, as in :class:`hf_drt.DRTConfig`.
        evaluate: Gives a loss; called with the model in evaluation mode before and after.
        calibration: Batches, each a mapping for ``model(**batch)``, a tuple or list for ``model(*batch)``, or a tensor;
            taken one by one. What is small, and what ``energy`` and ``parameters`` count, is then the error of each
            layer's outputs on the inputs that it has in them (:func:`hf_drt.linalg.weighted_truncation`), in place of
            the error of its weight. They pass through the model as it is before: ``n^2`` numbers are kept of a layer of
            n inputs.

    Returns:
        Rank, error and parameters by layer, and the measured loss.

    Raises:
        ValueError: Not exactly one criterion, a value outside its interval, no layer to compress, or a weight that
            holds inf or nan. The model is as it was.
        HalfwayError: Memory has run out after the first layer had changed: the model is of no use any more.
    """
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"evaluate must be a function that takes the model and gives a number, got {evaluate!r}.")
    plan, covariances = _planned(
        model, _criterion(rank=rank, rank_ratio=rank_ratio, energy=energy, parameters=parameters), rank_multiple,
        calibration, include=include, exclude=exclude, blocks=blocks, ignore_source=ignore_source,
    )  # fmt: skip
    before = _measured(model, evaluate)
    split_attention(model, [layer.name for layer in plan.layers])
    changing = (layer for layer in plan.layers if form_of(layer_of(model, layer.name)) != layer.form)
    exchange_layers(
        model,
        {layer.name: (layer.form, partial(_prepared, layer.form, covariances.get(layer.name))) for layer in changing},
    )
    declare(model)
    return with_fields(plan, loss=(before, _measured(model, evaluate))) if before is not None else plan


def plan_compression(
    model: nn.Module,
    *,
    rank: int | None = None,
    rank_ratio: float | None = None,
    energy: float | None = None,
    parameters: float | None = None,
    rank_multiple: int = 8,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    blocks: list[str] | None = None,
    ignore_source: list[str] | None = None,
    calibration: Iterable[Any] | None = None,
) -> Compression:
    """What :func:`compress` would do, from the singular values alone; the model is not touched.

    Arguments and errors as there.
    """
    return _planned(
        model, _criterion(rank=rank, rank_ratio=rank_ratio, energy=energy, parameters=parameters), rank_multiple,
        calibration, include=include, exclude=exclude, blocks=blocks, ignore_source=ignore_source,
    )[0]  # fmt: skip


def _prepared(form: Form, covariance: Tensor | None, layer: nn.Module) -> Conversion:
    return prepare(layer, form, parts=decompose(layer, form, covariance))


def _planned(
    model: nn.Module,
    criterion: tuple[str, float],
    rank_multiple: int,
    calibration: Iterable[Any] | None,
    **chosen: list[str] | None,
) -> tuple[Compression, dict[str, Tensor]]:
    """The plan, and the second moments of inputs that it goes by, by layer; none without calibration."""
    name, value = criterion
    ranks: dict[str, Any] = {name: value} if name in ("rank", "rank_ratio") else {}
    patterns: dict[str, Any] = chosen
    DRTConfig(rank_multiple=rank_multiple, **patterns, **ranks)  # checks them
    selection = find_targets(model, **patterns)
    selection.log_notes()
    targets = {name: module for name, module in selection.targets.items() if stack_count(module) is None}
    if not targets:
        raise ValueError("all selected layers are fused experts, which are not compressed. Select linear layers too.")
    covariances = {} if calibration is None else _inputs(model, targets, calibration)
    layers = [_layer(name, module, covariances.get(name)) for name, module in targets.items()]
    forms = _forms(layers, name, value, rank_multiple)
    if all(form == layer.form for form, layer in zip(forms, layers, strict=True)):
        raise ValueError(
            f"{name}={value} leaves all {len(layers)} layers as they are: factors of the ranks that it asks for would "
            f"hold no fewer parameters. Lower {name}."
        )
    results = tuple(layer.result(form) for layer, form in zip(layers, forms, strict=True))
    total = sum(p.numel() for p in model.parameters())
    saved = sum(before - after for before, after in (result.parameters for result in results))
    plan = Compression(f"{name}={value}", results, (total, total - saved), calibrated=calibration is not None)
    return plan, covariances


def _inputs(model: nn.Module, names: Iterable[str], calibration: Iterable[Any]) -> dict[str, Tensor]:
    """Packed attention does not call its projections as layers, and does so for as long as it is split."""
    with attention_split(model):
        return covariances_of(model, {name: layer_of(model, name) for name in names}, calibration)


def _forms(layers: list["_Layer"], name: str, value: float, rank_multiple: int) -> list[Form]:
    """What a criterion makes of the layers."""
    match name:
        case "parameters":
            return _by_budget(layers, _budget(value, layers), rank_multiple)
        case "energy":
            return [layer.at(_energy_rank(layer, value, rank_multiple)) for layer in layers]
        case "rank":
            return [layer.at(int(value)) for layer in layers]
        case _:  # rank_ratio
            return [layer.at(resolve_rank(layer.shape, float(value), rank_multiple)) for layer in layers]


@dataclass(frozen=True)
class _Layer:
    """A target layer by its numbers.

    Attributes:
        form: The form that it is in.
        whole: The cheapest form without any error.
        values: Singular values of the effective W, descending; with calibration those of ``W S``, with ``S S^T`` the
            second moments of its inputs (:func:`hf_drt.linalg.input_root`).
    """

    name: str
    shape: LayerShape
    form: Form
    whole: Form
    values: Tensor

    def at(self, rank: int) -> Form:
        """Factors of this rank, if that saves anything."""
        return Factored(rank) if _stored(Factored(rank), self.shape) < _stored(self.whole, self.shape) else self.whole

    def error(self, form: Form) -> float:
        """Relative Frobenius error."""
        return truncation_error(self.values, form.rank) if isinstance(form, Factored) and form != self.whole else 0.0

    def options(self, multiple: int) -> list[Form]:
        """The forms a budget may choose from, cost rising."""
        ranks = range(multiple, min(self.shape), multiple)
        return [form for form in map(self.at, ranks) if form != self.whole] + [self.whole]

    def result(self, form: Form) -> LayerCompression:
        stored = _stored(self.form, self.shape), _stored(form, self.shape)
        return LayerCompression(self.name, self.shape, form, self.error(form), stored)


def _layer(name: str, module: nn.Module, covariance: Tensor | None) -> _Layer:
    form, shape = form_of(module), weight_shape(module)
    try:
        S = None if covariance is None else input_root(covariance)
        if isinstance(module, FactoredLinear):
            L, R, _ = module.pair()
            values = factored_singular_values(L, R if S is None else R.detach() @ S.to(R))
        else:
            W = effective_weight(module)
            values = singular_values(W if S is None else W @ S.to(W))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    whole = form if isinstance(form, Factored) and _stored(form, shape) < _stored(Dense(), shape) else Dense()
    return _Layer(name, shape, form, whole, values)


def _stored(form: Form, shape: tuple[int, int]) -> int:
    """Weights that a layer holds, bias aside."""
    return parameters_of(form, shape) + (math.prod(shape) if isinstance(form, Adapter) else 0)


def _criterion(**given: float | None) -> tuple[str, float]:
    """The one criterion that is set, and its value."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}; got {' and '.join(chosen) or 'none'}.")
    ((name, value),) = chosen.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "energy" and not (number and 0 < value <= 1):
        raise ValueError(f"energy must be in (0, 1], got {value!r}. It is the share of ||W||_F^2 that a layer keeps.")
    if name == "parameters" and not (number and (value >= 1 if isinstance(value, int) else 0 < value < 1)):
        raise ValueError(
            f"parameters must be a share of the dense layers' in (0, 1), with a decimal point, or a whole number of at "
            f"least 1, got {value!r}."
        )
    return name, value


def _energy_rank(layer: _Layer, share: float, multiple: int) -> int:
    """The smallest rank, a multiple, that keeps this share of ``||W||_F^2``."""
    kept = (layer.values.double() ** 2).cumsum(0)
    enough = int((kept < share * kept[-1]).sum()) + 1
    return multiple * math.ceil(enough / multiple)


def _budget(value: float, layers: list[_Layer]) -> int:
    dense = sum(_stored(Dense(), layer.shape) for layer in layers)
    return value if isinstance(value, int) else int(value * dense)


def _by_budget(layers: list[_Layer], budget: int, multiple: int) -> list[Form]:
    """The better of water-filling and of the largest uniform ratio within the budget."""
    options = [layer.options(multiple) for layer in layers]
    least = sum(_stored(forms[0], layer.shape) for layer, forms in zip(layers, options, strict=True))
    if budget < least:
        dense = sum(_stored(Dense(), layer.shape) for layer in layers)
        raise ValueError(
            f"a budget of {budget:,} parameters is too small: at rank {multiple}, the least that rank_multiple allows, "
            f"the {len(layers)} layers hold {least:,} ({least / dense:.3f} of dense). Raise parameters, or lower "
            "rank_multiple."
        )
    curves: list[Curve] = [
        [(_stored(form, layer.shape), layer.error(form) ** 2) for form in forms]
        for layer, forms in zip(layers, options, strict=True)
    ]
    filled = [forms[index] for forms, index in zip(options, allocate(curves, budget), strict=True)]
    return min(filled, _uniform(layers, budget, multiple), key=lambda forms: _squared_error(layers, forms))


def _uniform(layers: list[_Layer], budget: int, multiple: int) -> list[Form]:
    """The forms of the largest rank_ratio within the budget, found among the ratios where a rank changes."""
    widths = {min(layer.shape) for layer in layers}
    ratios = sorted({(j + 0.5) * multiple / width for width in widths for j in range(width // multiple + 1)})

    def forms(ratio: float) -> list[Form]:
        return [layer.at(resolve_rank(layer.shape, ratio, multiple)) for layer in layers]

    def cost(ratio: float) -> int:
        return sum(_stored(form, layer.shape) for layer, form in zip(layers, forms(ratio), strict=True))

    low, high = 0, len(ratios)  # ratios[:low] fit, ratios[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(ratios[middle] * (1 + 1e-9)) <= budget else (low, middle)
    return forms(ratios[low - 1] * (1 + 1e-9) if low else 1e-9)


def _squared_error(layers: list[_Layer], forms: list[Form]) -> float:
    return sum(layer.error(form) ** 2 for layer, form in zip(layers, forms, strict=True))


@torch.no_grad()
def _measured(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    """The loss in evaluation mode; every module's own mode is put back."""
    if evaluate is None:
        return None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        value = evaluate(model)
    finally:
        for module, training in modes:
            module.training = training
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"evaluate must give a number, got {value!r}.") from None
