"""A trained model's layers as factors, for a smaller and faster model: truncated where their spectrum allows it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace as with_fields
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_drt.checkpoint import declare
from hf_drt.compress.choice import Choice, chosen
from hf_drt.compress.criteria import criterion_of
from hf_drt.compress.inputs import Moments
from hf_drt.compress.layers import truncated_parts
from hf_drt.compress.objective import Loss
from hf_drt.compress.request import Request
from hf_drt.compress.result import Compression
from hf_drt.covariance import evaluating
from hf_drt.forms import Conversion, Form, form_of, layer_of, prepare
from hf_drt.targets import split_attention
from hf_drt.transition import exchange_layers

logger = logging.getLogger(__name__)


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
    allocation: str | None = None,
    sequential: bool = False,
    loss: Loss | None = None,
) -> Compression:
    """Re-factor linear layers, convolutions and fused experts of a trained model in place, by exactly one criterion.

    Each layer's W becomes ``U V`` of a lower rank: with ``calibration`` the best there is for the layer's outputs on
    those batches, else the best in the Frobenius norm. A layer stays dense where factors would hold as many parameters,
    i.e. from rank ``out in / (out + in)`` on, and where the budget is worth more there. The model may be in any mix of
    forms: factored layers go on to a lower rank or stay as they are, adapters are merged. The factors are trainable:
    fine-tuning regains some of the loss.

    The weights of a model that was trained densely have no low rank: without calibration a deep cut ruins the model,
    which is warned of. Look at ``evaluate``'s difference before you use the result.

    Args:
        model: With transformer blocks (:mod:`hf_drt.targets.selection`).
        rank: The same rank for all layers, at least 1.
        rank_ratio: Rank as a share of min(out, in), in (0, 1].
        energy: Share of each layer's ``||W||_F^2`` to keep, in (0, 1]; the smallest rank that does.
        parameters: Budget for the stored weights of all target layers together: a number with a decimal point in (0, 1)
            is a share of their dense ``out in``, a whole number an absolute count. ``allocation`` tells how it is
            shared out.
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
    request = Request(
        criterion_of(rank=rank, rank_ratio=rank_ratio, energy=energy, parameters=parameters), rank_multiple,
        calibration, allocation, sequential, loss,
        {"include": include, "exclude": exclude, "blocks": blocks, "ignore_source": ignore_source},
    )  # fmt: skip
    choice = chosen(model, request)
    plan = choice.plan
    before = _measured(model, evaluate)
    if plan.warning is not None:
        logger.warning("%s Give calibration=batches.", plan.warning)
    split_attention(model, [layer.name for layer in plan.layers])
    _carried_out(model, choice)
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
    allocation: str | None = None,
    sequential: bool = False,
    loss: Loss | None = None,
) -> Compression:
    """What :func:`compress` would do, from the singular values alone; the model is as it was after.

    Arguments and errors as there. With ``sequential`` errors are those for the inputs as they are now.
    """
    request = Request(
        criterion_of(rank=rank, rank_ratio=rank_ratio, energy=energy, parameters=parameters), rank_multiple,
        calibration, allocation, sequential, loss,
        {"include": include, "exclude": exclude, "blocks": blocks, "ignore_source": ignore_source},
    )  # fmt: skip
    return chosen(model, request).plan


def _carried_out(model: nn.Module, choice: Choice) -> None:
    """Group by group, each by what its moments are once those before it are done."""
    forms = {layer.name: layer.form for layer in choice.plan.layers}
    for group in choice.inputs.groups:
        changing = {name: forms[name] for name in group if form_of(layer_of(model, name)) != forms[name]}
        moments = choice.inputs.of([name for name in changing if name not in choice.ready], choice.loss)
        changes = {name: (form, partial(_prepared, choice, form, moments, name)) for name, form in changing.items()}
        # At once nothing has changed before all is ready; one by one each old weight is free before the next is cut.
        for part in [{name: change} for name, change in changes.items()] if choice.inputs.sequential else [changes]:
            exchange_layers(model, part)


def _prepared(choice: Choice, form: Form, moments: dict[str, Moments], name: str, layer: nn.Module) -> Conversion:
    ready = choice.ready.pop(name, None)
    if ready is not None and ready.layer is layer and ready.form == form:
        return ready.conversion
    if ready is not None:  # of a part of packed attention, which is split anew
        moments = choice.inputs.of([name], choice.loss)
    return prepare(layer, form, parts=truncated_parts(layer, form, *moments.pop(name, Moments())))


@torch.no_grad()
def _measured(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    """The loss in evaluation mode; every module's own mode is put back."""
    if evaluate is None:
        return None
    with evaluating(model):
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"evaluate must give a number, got {value!r}.") from None
