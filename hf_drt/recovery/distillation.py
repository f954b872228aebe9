"""Distillation: a model trained to give the outputs of another, by the Trainer."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.covariance import call, evaluating
from hf_drt.trainer import DRTTrainer

BATCH = "batch"
"""Key under which a batch that is no mapping goes through the Trainer."""


class DistillationTrainer(DRTTrainer):
    """A Trainer whose loss is the distance of the model's outputs from those of a reference (:func:`distance`).

    Batches need no labels. The schedule is any of ``drt_schedule``, or none.

    Args:
        reference: In evaluation mode, without gradients; moved to where the model is, each process has one of its own.
    """

    def __init__(self, *args: Any, reference: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reference = reference.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distance for one batch; what it is divided by is the batch's own number of positions.

        The reference computes in the precision of the training: Accelerate's autocast is of the trained model's own
        ``forward``, and does not reach it.
        """
        batch = inputs.get(BATCH, inputs)
        with torch.no_grad(), evaluating(self.reference), self.accelerator.autocast():
            wanted = call(self.reference, batch)
        outputs = call(model, batch)
        loss = distance(outputs, wanted, batch)
        return (loss, outputs) if return_outputs else loss


def distance(outputs: Any, wanted: Any, batch: Any) -> Tensor:
    """How far outputs are from those wanted: of logits the Kullback-Leibler divergence ``sum_c p_c log(p_c / q_c)`` of
    their distribution q from the p that is wanted, in nats, a mean over positions, or samples; of a single logit, and
    of outputs that are no logits, the mean of squares relative to those wanted.

    Positions of padding do not count: those where ``attention_mask`` is 0, of a decoder beside an encoder
    ``decoder_attention_mask``, or its labels -100. Of several outputs it is the sum.

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
    return torch.stack([_one(name, y, other, mask) for name, y, other in pairs]).sum()


def _pairs(outputs: Any, wanted: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What is compared, by name: logits if there are any, else the last hidden state or the first tensor."""
    if isinstance(outputs, Tensor):
        return [("", outputs, wanted)]
    if not isinstance(outputs, Mapping):
        return [("", outputs[0], wanted[0])] if isinstance(outputs, (tuple, list)) and outputs else []
    tensors = [name for name, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    names = [name for name in tensors if name.endswith("logits")]
    names = names or [name for name in tensors if name != "loss"][:1]
    return [(name, outputs[name], wanted[name]) for name in names]


def _mask(outputs: Any, batch: Any) -> Tensor | None:
    """Which positions of the outputs count; None for all."""
    if not isinstance(batch, Mapping):
        return None
    if not isinstance(outputs, Mapping) or "encoder_last_hidden_state" not in outputs:
        return batch.get("attention_mask")
    labels = batch.get("labels")
    return batch.get("decoder_attention_mask", None if labels is None else labels != -100)


def _one(name: str, y: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    y, wanted = y.float(), wanted.float()
    if mask is not None and y.shape[: mask.ndim] == mask.shape:
        kept = mask.to(y.device).bool()
        y, wanted = y[kept], wanted[kept]
    if name.endswith("logits") and y.shape[-1] > 1:
        y, wanted = (F.log_softmax(each.flatten(0, -2), dim=-1) for each in (y, wanted))
        return F.kl_div(y, wanted, reduction="batchmean", log_target=True)
    return (y - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
