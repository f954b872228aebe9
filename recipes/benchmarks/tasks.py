"""Model and data of each kind of benchmark task, from a task file's ``model`` and ``data`` sections."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from task import Task

sys.path.append(str(Path(__file__).parents[1]))  # data and models that recipes have too

# Each is a function of its module; what it needs is imported with it.
KINDS = {
    "causal_lm": "text_tasks",
    "masked_lm": "text_tasks",
    "tagger": "tagging_task",
    "image_classifier": "image_tasks",
    "text_classifier": "pretrained_tasks",
    "pretrained_lm": "pretrained_tasks",
}


def build(kind: str, model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """The task of a kind, one of :data:`KINDS`.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return getattr(import_module(KINDS[kind]), kind)(dict(model), dict(data), cache)
