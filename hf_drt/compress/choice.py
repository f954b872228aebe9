"""Which form each layer takes: by the layers' numbers, and for a budget by a trial of two ways to share it out."""

import logging
from typing import NamedTuple

from torch import nn

from hf_drt.compress.criteria import forms_for
from hf_drt.compress.inputs import Inputs, Moments, Ready, tried
from hf_drt.compress.layers import TargetLayer, measured_layer
from hf_drt.compress.objective import Loss, has_loss, mean_loss, model_loss
from hf_drt.compress.request import Request
from hf_drt.compress.result import Compression, Trial
from hf_drt.forms import Form, layer_of
from hf_drt.targets import attention_split, find_targets

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A plan, and what it goes by.

    Attributes:
        loss: By which layers' outputs are weighed as they are truncated; None for inputs alone.
        ready: Conversions that the trial of this plan has made, where there was memory to keep them.
    """

    plan: Compression
    inputs: Inputs
    loss: Loss | None
    ready: dict[str, Ready]


def chosen(model: nn.Module, request: Request) -> Choice:
    """What becomes of each layer. The model is as it was after."""
    selection = find_targets(model, **request.patterns)
    selection.log_notes()
    names = list(selection.targets)
    inputs = Inputs(model, names, request.calibration, request.sequential, again=request.may_harm)
    loss = _loss(model, request, inputs) if request.may_harm else None
    (name, value), multiple = request.criterion, request.rank_multiple
    if loss is not None:
        layers, forms, allocation, trials, ready = _better(model, inputs, request, loss)
        loss = loss if allocation == "harm" else None
    else:
        allocation = request.allocation or "error" if name == "parameters" else None
        layers, trials, ready = measured_layers(model, inputs, None), (), {}
        forms = forms_for(layers, name, value, multiple, allocation)
    if all(form == layer.form for form, layer in zip(forms, layers, strict=True)):
        raise ValueError(
            f"{name}={value} leaves all {len(layers)} layers as they are: factors of the ranks that it asks for would "
            f"hold no fewer parameters. Lower {name}."
        )
    results = tuple(layer.result(form) for layer, form in zip(layers, forms, strict=True))
    total = sum(p.numel() for p in model.parameters())
    saved = sum(before - after for before, after in (result.parameters for result in results))
    calibrated = request.calibration is not None
    plan = Compression(f"{name}={value}", results, (total, total - saved), None, calibrated, allocation, trials)
    return Choice(plan, inputs, loss, ready)


def _loss(model: nn.Module, request: Request, inputs: Inputs) -> Loss | None:
    """What harm is measured by; None where nothing was asked for and nothing is there."""
    if request.loss is not None:
        return request.loss
    if request.allocation == "harm" or has_loss(model, inputs.batches):
        return model_loss  # tells what is wrong if it has none
    logger.warning(
        "calibration batches give no loss, so the budget is shared out by the layers' relative errors, which are often "
        "worse than equal shares. Give batches with labels, or loss=, a function of the model and a batch."
    )
    return None


def measured_layers(model: nn.Module, inputs: Inputs, loss: Loss | None) -> list[TargetLayer]:
    """The layers weighed by their inputs, and with a loss by their outputs too.

    Group by group; within one the largest covariances go first, so that no other is there as they are decomposed.
    """
    found: dict[str, TargetLayer] = {}
    for group in inputs.groups:
        moments = inputs.of(group, loss)
        with attention_split(model):
            sizes = {name: 0 if C is None else C.numel() for name, (C, _) in moments.items()}
            for name in sorted(group, key=lambda name: -sizes.get(name, 0)):
                found[name] = measured_layer(name, layer_of(model, name), *moments.pop(name, Moments()))
    return [found[name] for group in inputs.groups for name in group]


def _better(
    model: nn.Module, inputs: Inputs, request: Request, loss: Loss
) -> tuple[list[TargetLayer], list[Form], str, tuple[Trial, ...], dict[str, Ready]]:
    """By harm, or in equal shares by inputs alone: what has the lower loss on the calibration, in a trial of each."""
    layers = measured_layers(model, inputs, loss)
    dense = mean_loss(model, inputs.batches, loss) if inputs.loss is None else inputs.loss
    trials = [_trial("dense", layers, [layer.form for layer in layers], dense)]
    taken, forms, ready = "", [], {}
    for allocation, weighing in (("harm", loss), ("uniform", None)):
        new = forms_for(layers, *request.criterion, request.rank_multiple, allocation)
        lossy = {layer.name: form for layer, form in zip(layers, new, strict=True) if form != layer.whole}
        with tried(model, lossy, inputs, weighing) as made:
            trials.append(_trial(allocation, layers, new, mean_loss(model, inputs.batches, loss)))
        if not taken or trials[-1].loss < trials[-2].loss:
            taken, forms, ready = allocation, new, {} if inputs.sequential else made
    if taken == "uniform":  # whose errors are those of outputs that nothing else weighs
        layers = measured_layers(model, inputs, None)
    return layers, forms, taken, tuple(trials), ready


def _trial(allocation: str, layers: list[TargetLayer], forms: list[Form], loss: float) -> Trial:
    parameters = sum(layer.result(form).parameters[1] for layer, form in zip(layers, forms, strict=True))
    return Trial(allocation, loss, parameters)
