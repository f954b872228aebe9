"""The matrix optimizer's update of one layer, whatever its form.

A dense W moves as under :class:`torch.optim.Muon`, in float32 to the same bits; factors and adapters by
:mod:`hf_drt.optim.pair_rule`. One rate holds for all, since in every form it bounds, to first order, the spectral norm
of W's change: a layer's is ``lr sqrt(max(1, out / in))``. Momentum is Nesterov's, ``B <- beta B + (1 - beta) G`` of
each weight's own gradient; decay is decoupled and acts on W, or on the product ``s L R``, which a factor ``1 - lr
lambda`` shrinks in every form.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from hf_drt.forms import LowRankLinear, layout_of, trainable_weights
from hf_drt.linalg import full_precision, polar, working_dtype
from hf_drt.optim.pair_rule import pair_update
from hf_drt.optim.registry import rule_of
from hf_drt.optim.rule import Group

# The rate that such a group was asked to have.
MATRIX_LR = "drt_matrix_lr"
# Marks a group of such weights, and is their momentum's beta; the entry of the state that holds the momentum.
MATRIX, MOMENTUM = "drt_matrix_momentum", "drt_momentum"


@torch.no_grad()
@full_precision()
def update_layer(
    optimizer: torch.optim.Optimizer,
    layer: nn.Module,
    gradients: list[Tensor | None],
    group: Group,
    scale: Tensor | None = None,
) -> None:
    """Update one layer by the gradients of its trainable weights.

    Args:
        optimizer: Its state takes the momentum.
        layer: In any form.
        gradients: In the order of :func:`hf_drt.forms.trainable_weights`; None of a frozen weight.
        group: Learning rate, weight decay and, as MATRIX, the momentum's beta.
        scale: Of the loss, where the gradients still have it.
    """
    weights, lr = trainable_weights(layer), float(group["lr"])
    kept = max(0.0, 1 - lr * group.get("weight_decay", 0.0))  # of W, or of the product
    trained = sum(gradient is not None for gradient in gradients)
    # The step may stand in the caller's autocast, where products would be of half precision.
    with torch.autocast(weights[0].device.type, enabled=False):
        steps = _steps(optimizer, layer, gradients, lr, group, scale)
        for weight, gradient, (step, amount) in zip(weights, gradients, steps, strict=True):
            if gradient is not None:
                _take(weight, step, amount, kept ** (1 / trained))


def _steps(
    optimizer: torch.optim.Optimizer,
    layer: nn.Module,
    gradients: list[Tensor | None],
    lr: float,
    group: Group,
    scale: Tensor | None,
) -> list[tuple[Tensor, float]]:
    """What is taken from each of a layer's trainable weights, and how many times. The momenta are gone by then."""
    directions = [
        _direction(optimizer, weight, gradient, scale, group)
        for weight, gradient in zip(trainable_weights(layer), gradients, strict=True)
    ]
    if isinstance(layer, LowRankLinear):
        return [(step, 1.0) for step in _pair_steps(layer, directions, lr)]
    layout = layout_of(layer)
    W = layout.matrix(directions[0])
    return [(layout.stored(polar(W)), _rate(W.shape[-2], W.shape[-1], lr))]


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


def _pair_steps(layer: LowRankLinear, directions: list[Tensor], lr: float) -> list[Tensor]:
    """The steps of a layer's two factors, in the order of its trainable weights."""
    L, R, scale = layer.pair()
    left_first = trainable_weights(layer)[0] is L
    M_L, M_R = directions if left_first else directions[::-1]
    dtype = M_L.dtype
    steps = pair_update(L.to(dtype), R.to(dtype), M_L, M_R, _rate(L.shape[-2], R.shape[-1], lr) / scale)
    return list(steps if left_first else steps[::-1])


def _rate(d_out: int, d_in: int, lr: float) -> float:
    """Of a layer, as torch.optim.Muon adjusts it by default."""
    return lr * sqrt(max(1, d_out / d_in))


def _take(weight: Tensor, step: Tensor, amount: float, keep: float) -> None:
    """``weight <- keep weight - amount step``, computed in float32 or better and rounded once."""
    work = weight.to(working_dtype(weight.dtype))
    work.mul_(keep).add_(step, alpha=-amount)
    if work is not weight:
        weight.copy_(work)
