"""What loads a checkpoint in the format linear-pairs; :mod:`hf_drt.export.pairs.code` writes it beside the weights.

It stands alone: it needs torch, and the class of transformers that it is mixed into.
"""

import torch
from torch import nn


class LinearPair(nn.Sequential):
    """``y = U (V x) + b``: two linear layers in the place of one whose weight is ``W = U V``.

    The buffer ``weight`` has no elements. Its name stands in the checkpoint so that a class without pairs stops at a
    wrong shape, where it would otherwise load random weights with a warning. It has the dtype of the layer, which some
    models read.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, like: torch.Tensor):
        own = {"dtype": like.dtype, "device": like.device}
        first = nn.Linear(in_features, rank, bias=False, **own)
        super().__init__(first, nn.Linear(rank, out_features, bias=bias, **own))
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(0, in_features, **own))

    @property
    def bias(self) -> torch.Tensor | None:
        return self[1].bias  # type: ignore[return-value]


class LinearPairs:
    """Mixed into a model's class: the layers that ``config.linear_pairs`` names are pairs of the ranks given there."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        put_pairs(self, config.linear_pairs)  # type: ignore[arg-type]


def put_pairs(model: nn.Module, ranks: dict[str, int]) -> None:
    """Put a pair in the place of each layer that is named; of a layer with several names, the same pair."""
    made: dict[int, tuple[nn.Module, LinearPair]] = {}  # the layer too, or another could get its id
    for name, rank in ranks.items():
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = getattr(owner, attribute)
        if isinstance(layer, LinearPair):  # under another name of its owner
            continue
        if id(layer) not in made:
            # Conv1D of transformers (GPT-2) calls its sizes nx and nf.
            size = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)
            made[id(layer)] = layer, LinearPair(*size, rank, layer.bias is not None, layer.weight)
        setattr(owner, attribute, made[id(layer)][1])
