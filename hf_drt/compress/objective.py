"""The loss on calibration batches, by which ways to share out a budget are compared."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance import call, evaluating

Loss = Callable[[nn.Module, Any], Tensor]
"""Of a model and a batch, a mean that can be differentiated."""

_NO_LOSS = (
    "the model's output for a calibration batch has no loss, by which harm is measured. Give batches with labels, or "
    "loss=, a function of the model and a batch; or take allocation='error' or 'uniform', which need none."
)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The ``loss`` of the model's own output. A causal language model that is given ``input_ids`` without labels has to
    tell its next token, wherever ``attention_mask`` is 1.

    Raises:
        ValueError: There is none.
    """
    output = call(model, _labelled(model, batch))
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(_NO_LOSS)
    return loss


def _labelled(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping) or "labels" in batch or "input_ids" not in batch:
        return batch
    if "CausalLM" not in type(model).__name__ and "LMHead" not in type(model).__name__:
        return batch
    if "labels" not in inspect.signature(model.forward).parameters:
        return batch
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


def has_loss(model: nn.Module, batches: Sequence[Any]) -> bool:
    """Whether :func:`model_loss` has one for the first batch."""
    if not batches:
        return False
    try:
        with evaluating(model), torch.no_grad():
            model_loss(model, batches[0])
    except ValueError as error:
        if str(error) != _NO_LOSS:
            raise
        return False
    return True


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    """Over the batches, in evaluation mode; infinite where it is no number, which nothing is worse than."""
    with evaluating(model):
        return finite_mean([float(loss(model, batch)) for batch in batches])


def finite_mean(losses: Sequence[float]) -> float:
    """The mean; infinite where it is no number."""
    mean = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
    return mean if math.isfinite(mean) else math.inf
