"""The end of training: the model in the form that the user has asked for, before anybody else looks at it."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_drt.controller import DynamicRank
from hf_drt.engines import engine_of
from hf_drt.export import merge_errors
from hf_drt.forms import FactoredLinear, FrozenLinear
from hf_drt.trainer.ema import deliver_average

logger = logging.getLogger(__name__)


class Delivery(TrainerCallback):
    """With ``drt_export=dense`` the model is an ordinary dense one once training is over.

    So a script that ends in ``model.save_pretrained(...)``, and whatever a report or another callback saves at the end,
    gets what was promised. It has to be the first of the callbacks.

    Args:
        trainer: With DRTTrainerMixin.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._drt_deliver()
        deliver_average(self._trainer)


def may_become_dense(model: nn.Module) -> bool:
    """Whether a model can be made dense in place without a loss; where not, the log says why.

    In half precision an adapter's update may be lost to rounding, and factors take less memory than what they make up.
    A sharded model stays as it is, since no process could save it by itself.
    """
    if engine_of(model).sharded:
        return False
    name, worst = max(merge_errors(model).items(), key=lambda entry: entry[1], default=("", 0.0))
    if worst > 0.1:
        logger.warning(
            "the model keeps the form of its last phase: rounding to the weights' dtype would lose %.0f %% of what %s "
            "has learned. trainer.save_model() writes a dense model all the same; for one without that loss convert "
            "the model to float32 first.",
            100 * worst,
            name,
        )
        return False
    if not _has_room(model):
        logger.warning(
            "the model keeps the form of its last phase: there is no memory for its dense weights. "
            "trainer.save_model() may fail for the same reason; move the model to the CPU first."
        )
        return False
    return True


def _has_room(model: nn.Module) -> bool:
    more: dict[torch.device, int] = {}
    for layer in model.modules():
        if isinstance(layer, (FactoredLinear, FrozenLinear)):
            device = next(layer.parameters()).device
            more[device] = more.get(device, 0) + _more_bytes(layer)
    try:
        for device, size in more.items():
            torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def _more_bytes(layer: FactoredLinear | FrozenLinear) -> int:
    """What the dense weight takes; of a W that is frozen in fewer bits, beyond those."""
    whole = layer.weight.numel() * layer.weight.dtype.itemsize
    return whole - layer.kept.nbytes if isinstance(layer, FrozenLinear) else whole


def deliver(controller: DynamicRank, optimizer: torch.optim.Optimizer | None) -> None:
    """The model dense, in place, where that loses nothing; an optimizer follows."""
    if not controller.is_dense and may_become_dense(controller.model):
        controller.to_dense(optimizer)
