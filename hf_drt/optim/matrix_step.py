"""The matrix optimizer's part in an optimizer's step.

The weights stay in the optimizer's groups, and their momentum in its state, so that schedulers, checkpoints and a
change of form see one optimizer. Its own step does not see their gradients, which are taken aside around it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from hf_drt.forms import trainable_weights
from hf_drt.optim.matrices import MATRIX, LayerUpdate, update_layers
from hf_drt.optim.owners import form_groups, owners, without_matrices
from hf_drt.optim.rule import Group

_Layer = tuple[nn.Module, tuple[nn.Parameter, ...]]  # with its trainable weights


class MatrixStep:
    """What the optimizer's step does not do: :meth:`before` it takes the gradients aside, :meth:`after` it updates."""

    def __init__(self) -> None:
        self._updates: list[LayerUpdate] = []
        self._others: list[_Seen] = []

    def before(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        """Take the gradients of the matrices aside.

        Raises:
            ValueError: The gradients will be computed in the step only, or a layer is gone; nothing has changed then.
                Or as in :meth:`give_back`.
        """
        self.give_back()
        if closure is not None and any(MATRIX in group for group in optimizer.param_groups):
            raise ValueError(
                "matrix_optimizer takes the gradients before optimizer.step(), and step(closure) computes them in it. "
                f"Call the closure first, then step() without it.{without_matrices(optimizer)}"
            )
        self._updates = list(_updates(optimizer))
        for update in self._updates:
            for weight in update.weights:
                weight.grad = None
        self._others = _seen(optimizer) if self._updates else []

    def give_back(self) -> None:
        """Where the step before has raised: the gradients that were taken aside are the weights' again if it is to be
        made once more, and are forgotten if gradients have been cleared or computed anew since.

        Which of the two, the other weights' gradients tell, which were not taken aside.

        Raises:
            ValueError: They do not tell.
        """
        anew = any(weight.grad is not None for update in self._updates for weight in update.weights)
        cleared = any(other.replaced() for other in self._others) or (anew and not self._others)
        if self._updates and not cleared:
            if anew or not self._others or any(other.changed() for other in self._others):
                raise ValueError(
                    "the optimizer.step() before has raised, and it cannot be told whether the gradients that "
                    "matrix_optimizer had taken aside in it are still to be applied. Clear all gradients with "
                    "optimizer.zero_grad(set_to_none=True), compute them anew, then call step()."
                )
            _put_back(self._updates)
        self._updates, self._others = [], []

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradients back, and update the weights."""
        updates, self._updates, self._others = self._updates, [], []
        _put_back(updates)
        scale, overflow = _left_to_step(optimizer)
        if not overflow:
            update_layers(optimizer, updates, scale)


class _Seen:
    """A weight's gradient as it is now; it keeps neither alive."""

    def __init__(self, weight: nn.Parameter, gradient: Tensor):
        self._weight, self._gradient, self._version = TensorWeakRef(weight), TensorWeakRef(gradient), gradient._version

    def _now(self) -> Tensor | None:
        weight, gradient = self._weight(), self._gradient()
        return gradient if weight is not None and weight.grad is gradient else None

    def replaced(self) -> bool:
        """Whether it has gone, or another has taken its place."""
        return self._now() is None

    def changed(self) -> bool:
        """Whether something has been written to it."""
        return (now := self._now()) is None or now._version != self._version


def _seen(optimizer: torch.optim.Optimizer) -> list[_Seen]:
    weights = (p for group in optimizer.param_groups for p in group["params"])
    return [_Seen(weight, weight.grad) for weight in weights if weight.grad is not None]


def _put_back(updates: list[LayerUpdate]) -> None:
    for update in updates:
        for weight, gradient in zip(update.weights, update.gradients, strict=True):
            weight.grad = gradient


def _updates(optimizer: torch.optim.Optimizer) -> Iterator[LayerUpdate]:
    for owner in owners(optimizer):
        groups = {id(p): g for g in form_groups(optimizer, owner.number) if MATRIX in g for p in g["params"]}
        if groups and owner.model() is not None:
            layers = [(layer, trainable_weights(layer)) for layer in owner.modules()]
            _check_found(groups, layers)
            yield from _updates_of(layers, groups)


def _check_found(groups: dict[int, Group], layers: list[_Layer]) -> None:
    found = {id(weight) for _, weights in layers for weight in weights}
    lost = [p for group in groups.values() for p in group["params"] if p.grad is not None and id(p) not in found]
    if lost:
        raise ValueError(
            f"matrix_optimizer has a weight of shape {tuple(lost[0].shape)} in the optimizer, and its layer is no "
            "longer where it was in the model. Build DynamicRank and the optimizer after all other changes to it."
        )


def _updates_of(layers: list[_Layer], groups: dict[int, Group]) -> Iterator[LayerUpdate]:
    for layer, weights in layers:
        gradients = [weight.grad for weight in weights]
        if id(weights[0]) in groups and any(gradient is not None for gradient in gradients):
            yield LayerUpdate(layer, weights, gradients, groups[id(weights[0])])


def _left_to_step(optimizer: torch.optim.Optimizer) -> tuple[Tensor | None, bool]:
    """The loss scale that the gradients still have, and whether they have overflowed, where a GradScaler leaves both to
    a fused step."""
    overflow = getattr(optimizer, "found_inf", None)
    return getattr(optimizer, "grad_scale", None), overflow is not None and bool(overflow.item())
