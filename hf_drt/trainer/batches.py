"""What a batch holds: samples and tokens, whatever a collator has made of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def samples_in(batch: Any) -> int:
    """Rows of the first tensor (or array) that has any; of lists where there is none; 0 if the batch shows none.

    A list or tuple with tensors in it holds columns, as torch's own collator makes them of (x, y) pairs; any other is a
    list of samples.
    """
    tensors = (value for value in _values(batch) if _is_array(value) and value.ndim)
    if (first := next(tensors, None)) is not None:
        return len(first)
    return next((len(value) for value in _values(batch) if isinstance(value, list | tuple)), 0)


def tokens_in(batch: Any) -> int:
    """Entries of the first ``input_ids``, padding included; 0 without any."""
    if not isinstance(batch, Mapping):
        return 0
    ids = batch.get("input_ids")
    return _entries(ids) if ids is not None else next(filter(None, map(tokens_in, batch.values())), 0)


def _values(batch: Any) -> Iterator[Any]:
    """The columns of a batch: tensors, arrays, lists of samples and whatever else stands in it."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _values(value) if isinstance(value, Mapping) else (value,)
    elif isinstance(batch, list | tuple) and any(map(_is_array, batch)):
        yield from batch
    else:
        yield batch


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _entries(ids: Any) -> int:
    if isinstance(ids, list | tuple):
        return sum(map(_entries, ids))
    return int(np.prod(ids.shape)) if _is_array(ids) else int(isinstance(ids, int))
