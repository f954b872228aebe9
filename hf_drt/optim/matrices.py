"""The matrix optimizer's update of layers, whatever their form.

A dense W moves as under :class:`torch.optim.Muon`, in float32 to the same bits; factors and adapters by
:mod:`hf_drt.optim.pair_rule`. One rate holds for all, since in every form it bounds, to first order, the spectral norm
of W's change: a layer's is ``lr sqrt(max(1, out / in))``. Momentum is Nesterov's, ``B <- beta B + (1 - beta) G`` of
each weight's own gradient; decay is decoupled and acts on W, or on the product ``s L R``, which a factor ``1 - lr
lambda`` shrinks in every form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_drt.forms import LowRankLinear, layout_of
from hf_drt.linalg import full_precision, polar, working_dtype
from hf_drt.optim.pair_rule import pair_update
from hf_drt.optim.registry import rule_of
from hf_drt.optim.rule import Group

# The rate that such a group was asked to have.
MATRIX_LR = "drt_matrix_lr"
# Marks a group of such weights, and is their momentum's beta; the entry of the state that holds the momentum.
MATRIX, MOMENTUM = "drt_matrix_momentum", "drt_momentum"


# Entries of the factors, L's and R's, that are stacked at most: their copies take a few times as many bytes.
STACKED = 2**22


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's part in a step: its trainable weights, their gradients (None of a frozen one) and their group, which
    has the learning rate, the weight decay and, as MATRIX, the momentum's beta."""

    layer: nn.Module
    weights: tuple[nn.Parameter, ...]
    gradients: list[Tensor | None]
    group: Group


@torch.no_grad()
@full_precision()
def update_layers(
    optimizer: torch.optim.Optimizer, updates: Sequence[LayerUpdate], scale: Tensor | None = None
) -> None:
    """Update layers by the gradients of their trainable weights: pairs of factors of equal shapes together, so many
    that they have :data:`STACKED` entries at most.

    Args:
        optimizer: Its state takes the momentum.
        updates: Of layers in any form.
        scale: Of the loss, where the gradients still have it.
    """
    for batch in _batches(updates):
        # The step may stand in the caller's autocast, where products would be of half precision.
        with torch.autocast(batch[0].weights[0].device.type, enabled=False):
            for update, steps in zip(batch, _steps(optimizer, batch, scale), strict=True):
                _apply(update, steps)


def _batches(updates: Sequence[LayerUpdate]) -> Iterator[list[LayerUpdate]]:
    """Pairs of factors that one call can update, since each is small and the calls are what takes the time; all else
    layer by layer."""
    batches: dict[Any, list[LayerUpdate]] = {}
    for update in updates:
        key = _alike(update)
        batch = batches.setdefault(key, [])
        if batch and sum(_size(u) for u in (*batch, update)) > STACKED:
            yield batches.pop(key)
            batch = batches.setdefault(key, [])
        batch.append(update)
    yield from batches.values()


def _alike(update: LayerUpdate) -> Any:
    """Equal of pairs of factors that can be stacked; of other layers their own."""
    layer, group = update.layer, update.group
    if not isinstance(layer, LowRankLinear) or update.weights[0].ndim > 2:
        return id(layer)
    L, R, scale = layer.pair()
    return type(layer), L.shape, R.shape, scale, id(group), *((w.dtype, w.device) for w in (L, R))


def _size(update: LayerUpdate) -> int:
    return sum(weight.numel() for weight in update.weights)


def _apply(update: LayerUpdate, steps: list[tuple[Tensor, float]]) -> None:
    """Take from each trainable weight its step, so many times, and decay the product."""
    kept = max(0.0, 1 - float(update.group["lr"]) * update.group.get("weight_decay", 0.0))  # of W, or of the product
    trained = sum(gradient is not None for gradient in update.gradients)
    for weight, gradient, (step, amount) in zip(update.weights, update.gradients, steps, strict=True):
        if gradient is not None:
            _take(weight, step, amount, kept ** (1 / trained))


def _steps(
    optimizer: torch.optim.Optimizer, batch: list[LayerUpdate], scale: Tensor | None
) -> Iterator[list[tuple[Tensor, float]]]:
    """Of each layer of a batch what is taken from each of its trainable weights, and how many times."""
    directions = [list(_directions(optimizer, update, scale)) for update in batch]
    # Each momentum is let go of before the update is computed: together they are as large as the weights.
    layer, lr = batch[0].layer, float(batch[0].group["lr"])
    if isinstance(layer, LowRankLinear):
        yield from ([(step, 1.0) for step in steps] for steps in _pair_steps(batch, directions, lr))
    else:
        layout = layout_of(layer)
        W = layout.matrix(directions.pop()[0])
        yield [(layout.stored(polar(W)), _rate(W.shape[-2], W.shape[-1], lr))]


def _directions(optimizer: torch.optim.Optimizer, update: LayerUpdate, scale: Tensor | None) -> Iterator[Tensor]:
    """Of each trainable weight, in which direction it goes."""
    for weight, gradient in zip(update.weights, update.gradients, strict=True):
        yield _direction(optimizer, weight, gradient, scale, update.group)


def _direction(
    optimizer: torch.optim.Optimizer, weight: Tensor, gradient: Tensor | None, scale: Tensor | None, group: Group
) -> Tensor:
    """Nesterov's, in float32 or better; the buffer has the weight's dtype, as a checkpoint keeps it. Zero of a frozen
    weight."""
    dtype, beta = working_dtype(weight.dtype), group[MATRIX]
    if gradient is None:
        return torch.zeros_like(weight, dtype=dtype)
    gradient = gradient.to(dtype) if scale is None else gradient.to(dtype) / scale
    gradient = -gradient if group.get("maximize") else gradient
    if MOMENTUM not in optimizer.state[weight]:  # nor has what the optimizer may have made for its own steps a use
        sought = {key: torch.zeros(()) for key in rule_of(optimizer).sought}
        optimizer.state[weight] = sought | {MOMENTUM: torch.zeros_like(weight)}
    buffer = optimizer.state[weight][MOMENTUM]
    average = buffer.to(dtype).lerp_(gradient, 1 - beta)
    if average is not buffer:
        buffer.copy_(average)
    return gradient.lerp(average, beta)


def _pair_steps(batch: list[LayerUpdate], directions: list[list[Tensor]], lr: float) -> list[list[Tensor]]:
    """The steps of each layer's two factors, in the order of its trainable weights."""
    layers = [cast(LowRankLinear, update.layer) for update in batch]
    L, _, scale = layers[0].pair()
    left_first = batch[0].weights[0] is L
    order = slice(None) if left_first else slice(None, None, -1)
    dtype = directions[0][0].dtype
    factors = zip(*(layer.pair()[:2] for layer in layers), strict=True)
    momenta = zip(*(direction[order] for direction in directions), strict=True)
    stacks = [_stack([one.to(dtype) for one in side]) for side in (*factors, *momenta)]
    directions.clear()
    L, R, M_L, M_R = stacks
    dL, dR = pair_update(L, R, M_L, M_R, _rate(L.shape[-2], R.shape[-1], lr) / scale)
    if len(batch) == 1:
        return [[dL, dR][order]]
    return [list(pair)[order] for pair in zip(dL, dR, strict=True)]


def _stack(matrices: list[Tensor]) -> Tensor:
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def _rate(d_out: int, d_in: int, lr: float) -> float:
    """Of a layer, as torch.optim.Muon adjusts it by default."""
    return lr * sqrt(max(1, d_out / d_in))


def _take(weight: Tensor, step: Tensor, amount: float, keep: float) -> None:
    """``weight <- keep weight - amount step``, computed in float32 or better and rounded once."""
    work = weight.to(working_dtype(weight.dtype))
    work.mul_(keep).add_(step, alpha=-amount)
    if work is not weight:
        weight.copy_(work)
