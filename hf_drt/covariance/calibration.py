"""Second moments of layers' inputs over batches that are given, of a model that is not trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance.gathering import Gathering
from hf_drt.engines import engine_of


@torch.no_grad()
def covariances_of(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """``E[x x^T]`` of the inputs of layers over batches, which are taken one by one: none is kept.

    Args:
        model: Called with each batch, in evaluation mode and without gradients; every module's own mode is put back.
        layers: Linear layers and convolutions of it, in any form, by name.
        batches: Each a mapping, for ``model(**batch)``, a tuple or list, for ``model(*batch)``, or one tensor. Tensors
            are moved to where the model is. Several processes take batches of their own, and nothing is sent.

    Returns:
        ``(n, n)`` by name, in float32 or better; of grouped convolutions ``(groups, n, n)``. A layer that had no input
        is left out, with a warning.

    Raises:
        ValueError: There is no batch.
        TypeError: ``batches`` cannot be iterated over, or holds something else.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor, str)):
        raise TypeError(
            f"calibration must be an iterable of batches, got a {type(batches).__name__}. Of a single batch make a "
            "list: [batch]."
        )
    gathering, engine, count = Gathering(training=False, shared=False), engine_of(model), 0
    device = next(model.parameters()).device
    try:
        with _evaluating(model):
            for batch in batches:
                gathering.follow(layers, engine)
                _called(model, batch, device)
                count += 1
        if not count:
            raise ValueError("calibration has no batch. An iterator that has been used up gives none: make a new one.")
        return gathering.taken()
    finally:
        gathering.drop()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _called(model: nn.Module, batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return model(**{name: _on(value, device) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(_on(value, device) for value in batch))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    raise TypeError(
        f"a batch of calibration must be a mapping, a tuple or list, or a tensor, got a {type(batch).__name__}."
    )


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
