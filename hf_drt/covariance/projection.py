"""Gradients of dense layers projected on the leading directions of their inputs: an experiment."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance.gathering import Gathering
from hf_drt.engines import engine_of
from hf_drt.forms import Dense, form_of, layer_of, layout_of, weight_shape
from hf_drt.linalg import full_precision


class GradientProjection:
    """A step rule: ``G <- G E E^T`` before each step, with the k leading eigenvectors ``E (in, k)`` of second moments
    of inputs, and ``W <- W - lr beta (lambda_1 / tr C) W e_1 e_1^T``, a decoupled descent on ``1/2 ||W e_1||^2``.

    After spectral backpropagation (arXiv 2505.23369), with two differences. There the covariance is that of a layer's
    outputs in one place and meets a gradient ``(out, in)`` in another; here it is that of the inputs, on which a
    gradient ``sum g x^T`` lies. There the sharpness term subtracts ``beta lambda_1 e_1 e_1^T``, whatever W is, and fits
    square weights alone; here W shrinks along ``e_1``.

    It is for layers that are dense and trained as a step is made; those in another form, or with no more than k
    inputs, are passed over. Adam takes the projected gradient for its moments, and its own update leaves the subspace.

    Args:
        model: With the layers in it, be it changed by a plan meanwhile.
        names: Of the layers.
        k: Directions that are kept, at least 1.
        period: Update steps for which eigenvectors are used; those of the first one's inputs.
        sharpness: beta, at least 0.

    Raises:
        ValueError: A value outside its interval, or FSDP or ZeRO-3 has parts of the weights elsewhere.
    """

    def __init__(self, model: nn.Module, names: list[str], k: int, period: int, sharpness: float = 0.0):
        for name, value in (("k", k), ("period", period)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if isinstance(sharpness, bool) or not isinstance(sharpness, (int, float)) or not sharpness >= 0:
            raise ValueError(f"sharpness must be a number of at least 0, got {sharpness!r}.")
        self._model, self._names, self._k, self._period, self._sharpness = model, names, k, period, sharpness
        self._gathering = Gathering()
        self._bases: dict[str, tuple[Tensor, float]] = {}  # E with e_1 last, and lambda_1 / tr C
        self._handle: Any = None

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook it on the optimizer's step."""
        self.leave()
        self._handle = optimizer.register_step_pre_hook(self._before)

    def begin_step(self, step: int) -> None:
        """At the beginning of update ``step``, before its first forward pass, and after a change of form."""
        if (engine := engine_of(self._model)).sharded:
            raise ValueError("gradients cannot be projected where FSDP or ZeRO-3 shards them. Train with DDP.")
        if step % self._period == 0:
            self._gathering.follow(self._dense(), engine)

    def leave(self) -> None:
        """No hooks any more."""
        self._gathering.drop()
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _dense(self) -> Mapping[str, nn.Module]:
        layers = {name: layer_of(self._model, name) for name in self._names}
        return {n: m for n, m in layers.items() if form_of(m) == Dense() and weight_shape(m).d_in > self._k}

    @torch.no_grad()
    @full_precision()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._gathering.names:
            self._bases = {name: _leading(C, self._k) for name, C in self._gathering.taken().items()}
            self._gathering.drop()
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._dense().items():
            weight: Any = layer.weight
            if name not in self._bases or weight.grad is None:
                continue
            basis, share = self._bases[name]
            E, layout = basis.to(weight), layout_of(layer)
            G, W = layout.matrix(weight.grad), layout.matrix(weight.data)
            G.copy_(G @ E @ E.mT)
            if self._sharpness:
                e = E[:, -1:]
                W.sub_(W @ e @ e.mT, alpha=rates[id(weight)] * self._sharpness * share)


def _leading(C: Tensor, k: int) -> tuple[Tensor, float]:
    values, Q = torch.linalg.eigh(C)
    return Q[:, -k:].clone(), (values[-1] / values.sum()).item() if values[-1] > 0 else 0.0
