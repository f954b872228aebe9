"""Which form each layer takes: by the layers' numbers, and for a budget by a trial of two ways to share it out."""

import logging

from torch import nn

from hf_drt.compress.criteria import forms_for
from hf_drt.compress.inputs import Inputs, tried
from hf_drt.compress.layers import TargetLayer, measured_layer
from hf_drt.compress.objective import Loss, has_loss, mean_loss, model_loss
from hf_drt.compress.request import Request
from hf_drt.compress.result import Compression, Trial
from hf_drt.forms import Form, layer_of
from hf_drt.targets import attention_split, find_targets

logger = logging.getLogger(__name__)


def planned(model: nn.Module, request: Request) -> tuple[Compression, Inputs]:
    """The plan, and the second moments of inputs that it goes by."""
    selection = find_targets(model, **request.patterns)
    selection.log_notes()
    names = list(selection.targets)
    inputs = Inputs(model, names, request.calibration, request.sequential, again=request.may_harm)
    loss = _loss(model, request, inputs) if request.may_harm else None
    layers = _measured_layers(model, inputs, loss)
    (name, value), multiple = request.criterion, request.rank_multiple
    allocation = None
    if name == "parameters":
        allocation = "harm" if loss is not None else request.allocation or "error"
    forms, trials = forms_for(layers, name, value, multiple, allocation), ()
    if loss is not None:
        forms, allocation, trials = _better(model, inputs, layers, forms, request, loss)
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
    return plan, inputs


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


def _measured_layers(model: nn.Module, inputs: Inputs, loss: Loss | None) -> list[TargetLayer]:
    """Group by group; within one the largest covariances go first, so that no other is there as they are decomposed."""
    layers: dict[str, TargetLayer] = {}
    for group in inputs.groups:
        gradients = {} if loss is None else inputs.gradients_of(group, loss)
        moments = inputs.of(group)
        with attention_split(model):
            for name in sorted(group, key=lambda name: -moments[name].numel() if name in moments else 0):
                C, G = moments.pop(name, None), gradients.pop(name, None)
                layers[name] = measured_layer(name, layer_of(model, name), C, G if C is not None else None)
    return [layers[name] for group in inputs.groups for name in group]


def _better(
    model: nn.Module, inputs: Inputs, layers: list[TargetLayer], by_harm: list[Form], request: Request, loss: Loss
) -> tuple[list[Form], str, tuple[Trial, ...]]:
    """By harm or in equal shares: what has the lower loss on the calibration batches, in a trial of each."""
    ways = {"harm": by_harm, "uniform": forms_for(layers, *request.criterion, request.rank_multiple, "uniform")}
    trials = [_trial("dense", layers, [layer.form for layer in layers], mean_loss(model, inputs.batches, loss))]
    for allocation, forms in ways.items():
        lossy = {layer.name: form for layer, form in zip(layers, forms, strict=True) if layer.error(form) > 0}
        with tried(model, lossy, inputs):
            trials.append(_trial(allocation, layers, forms, mean_loss(model, inputs.batches, loss)))
    taken = min(trials[1:], key=lambda trial: trial.loss).allocation
    return ways[taken], taken, tuple(trials)


def _trial(allocation: str, layers: list[TargetLayer], forms: list[Form], loss: float) -> Trial:
    parameters = sum(layer.result(form).parameters[1] for layer, form in zip(layers, forms, strict=True))
    return Trial(allocation, loss, parameters)
