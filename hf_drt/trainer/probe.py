"""Probe: the model's output on a batch that is about to be trained on, to see what a switch does to the function."""

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Probe:
    """Callable that gives the logits (or the first floating-point output) of the trainer's model on ``batch``.

    Of the first row only, which bounds what is kept. In evaluation mode, without gradients, under the trainer's
    autocast, and with the random generators left alone. None if there is no batch yet, or the model cannot be called on
    it as it is (custom ``compute_loss``).
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.batch: Any = None

    def __call__(self) -> Tensor | None:
        if self.batch is None:
            return None
        model = self._trainer.model
        training = [module for module in model.modules() if module.training]
        devices = [self._trainer.args.device] if self._trainer.args.device.type == "cuda" else []
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), self._trainer.compute_loss_context_manager():
                outputs = model(**self._trainer._prepare_inputs(self.batch))
        except Exception as error:  # whatever a model raises, the switch goes on
            logger.warning("no function-preservation error: the model cannot be called on a training batch (%s)", error)
            self.batch = None
            return None
        finally:
            for module in training:
                module.training = True
        return _main_output(outputs)


def _main_output(outputs: Any) -> Tensor | None:
    values = outputs.values() if hasattr(outputs, "values") else outputs if isinstance(outputs, tuple) else (outputs,)
    logits = getattr(outputs, "logits", None)
    candidates = (logits, *values)
    found = next((v for v in candidates if torch.is_tensor(v) and v.is_floating_point()), None)
    return None if found is None else found[:1].float()
