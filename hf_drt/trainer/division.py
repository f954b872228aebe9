"""A batch divided into pieces by its samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OTHERWISE = "Leave dense_accumulation out, or take a smaller batch with more gradient_accumulation_steps."


def divided(batch: Any, count: int) -> list[dict[str, Any]]:
    """The batch in at most ``count`` pieces of neighbouring samples, as equal as can be; one per sample where it has
    fewer. Entries that are not by sample (numbers, texts, tensors of one row) stand in every piece.

    Raises:
        ValueError: It has no labels, or an entry of which it is not clear what belongs to which sample.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or not labels.ndim:
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "dense_accumulation divides batches that have 'labels', a tensor with a row for each sample, and the batch "
            f"holds {found}. {_OTHERWISE}"
        )
    rows = len(labels)
    ends = [part.tolist() for part in torch.arange(rows).tensor_split(max(1, min(count, rows)))]
    return [samples(batch, part[0], part[-1] + 1) for part in ends]


def samples(batch: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Samples ``[start, end)`` of a batch with labels, as :func:`divided` has them."""
    return _part(batch, len(batch["labels"]), start, end)


def _part(batch: Mapping[str, Any], rows: int, start: int, end: int) -> dict[str, Any]:
    return {name: _rows(str(name), value, rows, start, end) for name, value in batch.items()}


def _rows(name: str, value: Any, rows: int, start: int, end: int) -> Any:
    if isinstance(value, Mapping):
        return _part(value, rows, start, end)
    if not isinstance(value, Tensor | list | tuple) or (isinstance(value, Tensor) and not value.ndim):
        return value
    if len(value) == rows:
        return value[start:end]
    if isinstance(value, Tensor) and len(value) == 1:
        return value
    raise ValueError(
        f"dense_accumulation cannot divide the batch: its '{name}' has {len(value)} rows, and there are {rows} samples "
        f"by its labels. {_OTHERWISE}"
    )


def counted(piece: Mapping[str, Any], shifts: bool) -> int:
    """How many labels of a piece are counted in a mean loss: those that are not -100, without the first of every
    sequence where the loss shifts them."""
    labels = piece["labels"]
    if "shift_labels" in piece:
        labels = piece["shift_labels"]
    elif shifts:
        labels = labels[..., 1:]
    return int(labels.ne(-100).sum())
