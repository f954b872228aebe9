"""Averages written into a model's own parameters; into layers of low rank, cut to their rank."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_drt.ema.weights import Weight
from hf_drt.forms import AdapterLinear, FrozenLinear, LowRankLinear, decompose, effective_weight, prepare
from hf_drt.linalg import full_precision
from hf_drt.messages import some


@full_precision()
def put_into(weights: Mapping[str, Weight], averages: Mapping[str, Tensor], truncate: bool) -> dict[str, float]:
    """Write averages into the weights of the same names.

    Returns:
        ``||W - avg||_F / ||avg||_F`` of layers of low rank, by name.

    Raises:
        ValueError: There are such layers and ``truncate`` is False, or an average holds inf or nan.
    """
    low_rank = {key: weight.source for key, weight in weights.items() if isinstance(weight.source, LowRankLinear)}
    if low_rank and not truncate:
        raise ValueError(
            f"the average is dense, and the model has layers of low rank ({some(list(low_rank))}): a mean of products "
            "of rank r is of a higher rank. Make the model dense first (DynamicRank.to_dense), use the average as it "
            "is within `with ema.averaged()`, or cut it to the ranks of the layers by truncate=True."
        )
    cut = {key: _cut(layer, averages[key]) for key, layer in low_rank.items()}
    for key, layer in low_rank.items():
        for own, value in zip(layer.product_tensors(), cut[key], strict=True):
            own.copy_(value)
    for key, weight in weights.items():
        match weight.source:
            case Tensor():
                weight.source.copy_(averages[key])
            case FrozenLinear():
                weight.source.kept.copy_(averages[key])
    return {key: _error(layer, averages[key]) for key, layer in low_rank.items()}


def _cut(layer: LowRankLinear, average: Tensor) -> list[Tensor]:
    """The product's tensors, of an adapter those of what the average has beyond its base."""
    average, form = average.to(next(layer.parameters()).device), layer.form
    if isinstance(layer, AdapterLinear):
        average, form = (
            average - layer.whole_base(),
            replace(layer.form, init="principal"),
        )  # which is made of a truncation
    dense = layer.dense_with(nn.Parameter(average, requires_grad=False))
    made = prepare(dense, form, parts=decompose(dense, form)).module
    assert isinstance(made, LowRankLinear)
    return made.product_tensors()


def _error(layer: LowRankLinear, average: Tensor) -> float:
    W = layer.layout.matrix(average.to(next(layer.parameters()).device))
    return (torch.linalg.vector_norm(effective_weight(layer) - W) / torch.linalg.vector_norm(W)).item()
