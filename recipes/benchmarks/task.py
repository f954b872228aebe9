"""What a run trains and is judged by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import default_data_collator


@dataclass(frozen=True)
class Task:
    """Model, data and metric.

    Attributes:
        model: Makes a new model; ``set_seed`` comes before.
        train, evaluation: Datasets.
        collate: From samples to a batch.
        metrics: From logits and labels to named numbers, ``accuracy`` among them, or None where the loss is the metric.
    """

    model: Callable[[], nn.Module]
    train: Any
    evaluation: Any
    collate: Callable[[list], dict[str, Any]] = default_data_collator
    metrics: Callable[[Any], dict[str, float]] | None = None
