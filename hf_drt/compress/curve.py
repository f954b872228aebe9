"""Loss over size: what a model's loss is at several budgets, before one is chosen."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_drt.compress.choice import measured_layers
from hf_drt.compress.criteria import forms_for, least_of
from hf_drt.compress.inputs import Inputs, tried
from hf_drt.compress.objective import Loss, mean_loss, model_loss
from hf_drt.compress.request import Request
from hf_drt.covariance import checked_batches
from hf_drt.forms import form_of, layer_of
from hf_drt.tables import plain_table
from hf_drt.targets import find_targets

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """A model at one size.

    Attributes:
        share: Budget as a share of the target layers' dense parameters; 1 for the model as it is.
        parameters: Of the target layers.
        loss: Mean over the batches, in nats for a language model.
    """

    share: float
    parameters: int
    loss: float


class LossCurve(NamedTuple):
    """Points from large to small, the model as it is first; ``str()`` is a table."""

    points: tuple[Point, ...]

    def __str__(self) -> str:
        first = self.points[0]
        rows = [
            (f"{point.share:g}", f"{point.parameters:,}", f"{point.loss:.4f}", f"{point.loss - first.loss:+.4f}")
            for point in self.points
        ]
        return plain_table(("share", "parameters", "loss", "rise"), rows, left=0)


def loss_curve(
    model: nn.Module,
    shares: Sequence[float],
    calibration: Iterable[Any],
    *,
    evaluation: Iterable[Any] | None = None,
    rank_multiple: int = 8,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    blocks: list[str] | None = None,
    ignore_source: list[str] | None = None,
    loss: Loss | None = None,
) -> LossCurve:
    """The loss at each budget, shared out by harm as :func:`hf_drt.compress.compress` does it; the model is as it was
    after.

    The second moments are gathered and the layers decomposed once; each share takes a truncation of all layers and a
    forward pass over the evaluation. No recovery, and no comparison with equal shares.

    Args:
        model: With transformer blocks.
        shares: Each in (0, 1). Those below what the least ranks hold are left out, with a warning.
        calibration: Batches, with a loss.
        evaluation: Other batches to measure on; None for the same.
        rank_multiple, include, exclude, blocks, ignore_source, loss: As there.

    Raises:
        ValueError: No share, or one outside of (0, 1); or the batches give no loss.
    """
    if not shares:
        raise ValueError("shares is empty: give budgets in (0, 1), such as [0.8, 0.6].")
    patterns = {"include": include, "exclude": exclude, "blocks": blocks, "ignore_source": ignore_source}
    if bad := [share for share in shares if not (isinstance(share, float) and 0 < share < 1)]:
        raise ValueError(f"shares must lie in (0, 1), got {bad[0]!r}.")
    request = Request(("parameters", min(shares)), rank_multiple, calibration, "harm", False, loss, patterns)
    measure = loss or model_loss
    inputs = Inputs(model, list(find_targets(model, **patterns).targets), request.calibration, False, again=True)
    layers = measured_layers(model, inputs, measure)
    others = inputs.batches if evaluation is None else list(checked_batches(evaluation))
    found = [
        Point(1.0, sum(layer.result(layer.form).parameters[1] for layer in layers), mean_loss(model, others, measure))
    ]
    dense, least = found[0].parameters, least_of(layers, rank_multiple)
    reached = [share for share in sorted(set(shares), reverse=True) if int(share * dense) >= least]
    if left_out := sorted(set(shares) - set(reached)):
        logger.warning(
            "the curve leaves out %s: at rank %d, the least that rank_multiple allows, the layers hold %.3f of dense.",
            ", ".join(f"{share:g}" for share in left_out), rank_multiple, least / dense,
        )  # fmt: skip
    for share in reached:
        forms = forms_for(layers, "parameters", share, rank_multiple, "harm")
        new = {layer.name: form for layer, form in zip(layers, forms, strict=True)}
        changing = {name: form for name, form in new.items() if form_of(layer_of(model, name)) != form}
        kept = sum(layer.result(new[layer.name]).parameters[1] for layer in layers)
        with tried(model, changing, inputs, measure):
            found.append(Point(share, kept, mean_loss(model, others, measure)))
    return LossCurve(tuple(found))
