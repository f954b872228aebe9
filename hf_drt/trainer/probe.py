"""Probe: the model's output on a batch that is about to be trained on, to see what a switch does to the function."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hf_drt.engines import engine_of
from hf_drt.trainer.untouched import untouched

# Words in the name of what is not the model's output: losses, and what is kept for the next call.
_NO_OUTPUT = {"loss", "losses", "past", "mems", "cache", "kv"}


class Probe:
    """Callable that gives the logits (or the first floating-point output) of the trainer's model on ``batch``.

    Of the first row only, which bounds what is kept. In evaluation mode, without gradients, under the trainer's
    autocast, and on a copy of the batch; what the call changes in the model is put back
    (:func:`hf_drt.trainer.untouched.untouched`). None if there is no batch yet. Raises what the model raises that
    cannot be called on a batch as it is (custom ``compute_loss``): who asks has to expect it.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.batch: Any = None

    def __call__(self) -> Tensor | None:
        model = self._trainer.model
        if self.batch is None or not engine_of(model).computes_in_switch:
            return None
        inputs = _copied(self._trainer._prepare_input(self.batch))
        with untouched(model), torch.no_grad(), self._trainer.compute_loss_context_manager():
            for module in model.modules():
                module.training = False  # not eval(), which a model may have given effects of its own
            return main_output(_call(model, inputs))


def _copied(inputs: Any) -> Any:
    """The batch, so that a model that writes into its inputs does not write into those of the training."""
    kind: Any = type(inputs)
    if isinstance(inputs, Mapping):
        return kind({key: _copied(value) for key, value in inputs.items()})
    if kind in (tuple, list):
        return kind(_copied(value) for value in inputs)
    return inputs.clone() if torch.is_tensor(inputs) else inputs


def _call(model: torch.nn.Module, inputs: Any) -> Any:
    """The outputs for a batch of names, of positions (the first alone if the model takes no more), or of one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if not isinstance(inputs, tuple | list):
        return model(inputs)
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return model(inputs[0])
    return model(*inputs)


def main_output(outputs: Any) -> Tensor:
    """First row of the logits, else of the first output with floating-point (or complex) numbers in at least one
    dimension that is not the loss and no cache.

    Raises:
        ValueError: There is none.
    """
    candidates = ((name, tensor) for name, tensor in _leaves(outputs, "") if _has_rows(tensor))
    tensors = sorted(candidates, key=lambda candidate: candidate[0] != "logits")
    if not tensors:
        raise ValueError(
            f"a {type(outputs).__name__} holds no floating-point tensor of one dimension or more, loss and caches aside"
        )
    tensor = tensors[0][1]
    rows = tensor if tensor.layout == torch.strided else tensor.to_dense()
    # A copy, so that the other rows can be freed; float32 at least.
    return rows[:1].to(torch.promote_types(rows.dtype, torch.float32), copy=True)


def _has_rows(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim > 0 and tensor.numel() > 0


def _leaves(outputs: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings, dataclasses, tuples and lists, each with the last name on the way to it."""
    if torch.is_tensor(outputs):
        yield name, outputs
        return
    if isinstance(outputs, Mapping):
        items = list(outputs.items())
    elif is_dataclass(outputs):
        items = [(field.name, getattr(outputs, field.name)) for field in fields(outputs)]
    else:
        items = [(name, value) for value in outputs] if isinstance(outputs, tuple | list) else []
    for key, value in items:
        if not _NO_OUTPUT & set(str(key).split("_")):
            yield from _leaves(value, str(key))
