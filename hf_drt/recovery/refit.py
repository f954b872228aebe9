"""Least squares by layer: left factors that give back, for the inputs that a layer now has, the outputs that it had."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_drt.covariance import CrossMoments, Passes, chained, cross_moments, in_order, whole_passes
from hf_drt.forms import FactoredLinear, effective_weight, layer_of, stack_count
from hf_drt.linalg import refitted
from hf_drt.targets import block_roots


def can_be_refitted(layer: nn.Module) -> bool:
    """Whether least squares are for it: linear layers and convolutions of two factors. Not fused experts, each of which
    is given other tokens once the layers before have changed, nor convolutions in groups."""
    two = isinstance(layer, FactoredLinear) and layer.form.product.two_matrices
    return two and stack_count(layer) is None and getattr(layer, "groups", 1) == 1


@torch.no_grad()
def refit(model: nn.Module, reference: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> None:
    """Fit the left factors of layers, one after the other, to the outputs that they have in the reference; in place.

    They come block by block, and within a block in the order in which they are called, those with one input together.
    The inputs of each are those that all layers before it give once they are fitted: to fit two that follow one another
    to inputs of before would correct the same error twice.

    Where the model is a plain chain of blocks (:func:`hf_drt.covariance.chained`) each block is run, in both models,
    once for each of its inputs and once more; else both models up to the block. ``8 n^2`` bytes are held for each layer
    of n inputs in turn.

    Args:
        model: With layers in factored form.
        reference: The model as it was before, of the same structure.
        names: Of the layers, in the model's order, that :func:`can_be_refitted`.
        batches: As :func:`hf_drt.covariance.covariances_of`.
    """
    blocks = _by_block(model, names)
    chain = chained(model, reference, list(blocks), batches) if set(blocks) <= set(block_roots(model)) else None
    for block, group in blocks.items():

        def passes(block: str = block) -> Passes:
            return whole_passes(model, reference, batches, block) if chain is None else chain.passes(block)

        for alike in in_order(reference, group, passes()) if group else []:
            for name, moments in cross_moments(model, reference, alike, passes()).items():
                _fit(layer_of(model, name), layer_of(reference, name), moments)
        if chain is not None:
            chain.move_on(block)


def _by_block(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """The names by the block that they are in, in the model's order, with blocks that have none; a layer that is in
    none is one of its own."""
    groups: dict[str, list[str]] = {root: [] for root in block_roots(model)}
    for name in names:
        groups.setdefault(next((root for root in groups if name.startswith(f"{root}.")), name), []).append(name)
    return groups


def _fit(layer: Any, reference: nn.Module, moments: CrossMoments) -> None:
    U, V, _ = layer.pair()  # the parameters themselves
    U.copy_(refitted(U, V, effective_weight(reference), *moments))
