"""Distillation: a model trained to give the outputs of another, by the Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.covariance import call, evaluating
from hf_drt.trainer import DRTTrainer

BATCH = "batch"
"""Key under which a batch that is no mapping goes through the Trainer, as :class:`Held`."""


@dataclass(frozen=True)
class Held:
    """A batch that is no mapping, which the Trainer would take apart."""

    batch: Any


class DistillationTrainer(DRTTrainer):
    """A Trainer whose loss is the distance of the model's outputs from those of a reference (:func:`distance`).

    Batches need no labels. The schedule is any of ``drt_schedule``, or none.

    Args:
        reference: In evaluation mode, without gradients; moved to where the model is, each process has one of its own.
    """

    def __init__(self, *args: Any, reference: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reference = reference.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a batch's own mean, whatever the model's would be

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distance for one batch; what it is divided by is the batch's own number of positions.

        The reference computes in the precision of the training: Accelerate's autocast is of the trained model's own
        ``forward``, and does not reach it.
        """
        held = inputs.get(BATCH)
        batch = held.batch if isinstance(held, Held) else inputs
        with torch.no_grad(), evaluating(self.reference), self.accelerator.autocast():
            wanted = call(self.reference, batch)
        outputs = call(model, batch)
        loss = distance(outputs, wanted, batch, problem_type(self.reference))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The base's, with a loss where batches have no labels too."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is None:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        return loss, logits, labels


def problem_type(model: nn.Module) -> str | None:
    """What a classifier's configuration says that its logits mean; None where it says nothing."""
    return getattr(getattr(model, "config", None), "problem_type", None)


def distance(outputs: Any, wanted: Any, batch: Any, problem: str | None = None) -> Tensor:
    """How far outputs are from those wanted: of logits the Kullback-Leibler divergence ``sum_c p_c log(p_c / q_c)`` of
    their distribution q from the p that is wanted, in nats, a mean over positions, or samples; of a single logit, and
    of outputs that are no logits, the mean of squares relative to those wanted.

    Positions of padding do not count: those where ``attention_mask`` is 0, of a decoder beside an encoder
    ``decoder_attention_mask``, or its labels -100. Where that leaves none the distance is 0. Of several outputs it is
    the sum. Classes are the last dimension of logits, of those of pictures ``(samples, classes, height, width)`` the
    second.

    Args:
        problem: ``problem_type`` of a classifier's configuration: of 'multi_label_classification' it is the sum over
            labels of the divergence of each one's probability, of 'regression' the relative squares.

    Raises:
        ValueError: The outputs hold nothing that can be compared.
    """
    pairs = _pairs(outputs, wanted)
    if not pairs:
        raise ValueError(
            "the model's outputs for a batch hold neither logits nor hidden states, which a distillation compares. "
            "Give the model whole, with its head, or batches that it answers with a tensor."
        )
    mask = _mask(outputs, batch)
    return torch.stack([_one(name, y, other, mask, problem) for name, y, other in pairs]).sum()


def _pairs(outputs: Any, wanted: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What is compared, by name: logits if there are any, else the last hidden state or the first tensor."""
    if isinstance(outputs, Tensor):
        return [("", outputs, wanted)]
    if not isinstance(outputs, Mapping):
        both = zip(outputs, wanted, strict=True) if isinstance(outputs, (tuple, list)) else ()
        return [("", y, other) for y, other in both if _is_output(y)][:1]
    tensors = [name for name, value in outputs.items() if _is_output(value)]
    names = [name for name in tensors if name.endswith("logits")] or tensors[:1]
    return [(name, outputs[name], wanted[name]) for name in names]


def _is_output(value: Any) -> bool:
    """Whether it may be compared; a single number is a loss."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _mask(outputs: Any, batch: Any) -> Tensor | None:
    """Which positions of the outputs count; None for all."""
    if not isinstance(batch, Mapping):
        return None
    if not isinstance(outputs, Mapping) or "encoder_last_hidden_state" not in outputs:
        return batch.get("attention_mask")
    labels = batch.get("labels")
    return batch.get("decoder_attention_mask", None if labels is None else labels != -100)


def _one(name: str, y: Tensor, wanted: Tensor, mask: Tensor | None, problem: str | None) -> Tensor:
    y, wanted = y.float(), wanted.float()
    logits = name.endswith("logits")
    if logits and y.ndim == 4:
        y, wanted = y.movedim(1, -1), wanted.movedim(1, -1)
    # As many dimensions as the mask have logits of a sample, or those of which position it is: none is of padding.
    if mask is not None and y.ndim > mask.ndim and y.shape[: mask.ndim] == mask.shape:
        kept = mask.to(y.device).bool()
        y, wanted = y[kept], wanted[kept]
    if not y.numel():
        return y.sum()
    if logits and problem == "multi_label_classification":
        y, wanted = (torch.stack([F.logsigmoid(each), F.logsigmoid(-each)], dim=-1) for each in (y, wanted))
        return F.kl_div(y, wanted, reduction="batchmean", log_target=True)
    if logits and y.shape[-1] > 1 and problem != "regression":
        y, wanted = (F.log_softmax(each.flatten(0, -2), dim=-1) for each in (y, wanted))
        return F.kl_div(y, wanted, reduction="batchmean", log_target=True)
    return (y - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
