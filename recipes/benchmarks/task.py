"""What a run trains and is judged by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import default_data_collator


@dataclass(frozen=True)
class Task:
    """Model, data and metric.

    Attributes:
        model: Makes a new model; ``set_seed`` comes before.
        train, evaluation: Datasets.
        collate: From samples to a batch.
        metrics: From predictions and labels to named numbers, ``accuracy`` among them; None for the loss alone.
        predict: From logits and labels to the predictions that ``metrics`` is given; None for the logits.
        probe: Further numbers of a trained model, measured once.
    """

    model: Callable[[], nn.Module]
    train: Any
    evaluation: Any
    collate: Callable[[list], dict[str, Any]] = default_data_collator
    metrics: Callable[[Any], dict[str, float]] | None = None
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    probe: Callable[[nn.Module], dict[str, float]] | None = None
