"""How the loss depends on layers: second moments of their inputs and of its gradients at their outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_drt.covariance.calibration import checked_batches, evaluating, tokens_counted
from hf_drt.covariance.experts import ExpertMoments, stacks_of, told
from hf_drt.covariance.input_sums import InputSums
from hf_drt.covariance.moments import empty_moments
from hf_drt.engines import engine_of
from hf_drt.forms import layout_of
from hf_drt.linalg import full_precision


class Sensitivity(NamedTuple):
    """What :func:`sensitivity_of` finds.

    Attributes:
        C: ``E[x x^T]`` of layers' inputs by name, as :func:`hf_drt.covariance.covariances_of` gives it.
        G: ``E[g g^T]`` of the loss's gradients at their outputs: ``(out, out)`` by name, of fused experts
            ``(E, out, out)``. A layer without a gradient is left out.
        losses: Of the batches, in their order.
    """

    C: dict[str, Tensor]
    G: dict[str, Tensor]
    losses: list[float]


def sensitivity_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> Sensitivity:
    """How the loss depends on layers' weights, by one forward and backward pass of each batch.

    With ``C = E[x x^T]`` and ``G = E[g g^T]``, g the gradient of the summed loss with respect to one output, a change D
    of a layer's weight raises the mean loss by about ``1/2 tr(D C D^T G)``: the second-order term with the empirical
    Fisher matrix in place of the Hessian, and its Kronecker factors in place of it (K-FAC, Martens and Grosse 2015).
    The first-order term is left out: of a trained model it is small, and of either sign.

    Args:
        model: In evaluation mode; its parameters get no gradients, and its modules' modes are put back.
        layers: Linear layers, convolutions and fused experts, in any form, by name.
        batches: As of :func:`hf_drt.covariance.covariances_of`.
        loss: Of the model and a batch, the mean over positions, or samples.

    Returns:
        G scaled so that with C the formula holds.
    """
    sums, losses = _Sums(model, layers), []
    with evaluating(model), _frozen(model), sums.watching():
        for batch in checked_batches(batches):
            with torch.enable_grad():
                value = loss(model, batch)
            sums.end_batch(value)
            losses.append(float(value.detach()))
    return Sensitivity(sums.inputs(), sums.means(), losses)


class _Sums:
    """``N sum g g^T`` of a batch of N positions, whose mean loss has the gradients g; and the sum over batches.

    Of one expert of several, with n of these positions, that is ``N^2 sum g g^T / n``: its C is over all positions.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        self._model, self._stacks = model, stacks_of(layers)
        self._plain = {name: layer for name, layer in layers.items() if name not in self._stacks}
        self._sums = {name: empty_moments(m, next(m.parameters()).device, outputs=True) for name, m in layers.items()}
        self._experts = ExpertMoments(self._stacks, outputs=True)
        self._inputs, self._expert_inputs = InputSums(self._plain, engine_of(model)), ExpertMoments(self._stacks)
        self._all_tokens = dict.fromkeys(self._stacks, 0)
        self._batches = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers, in force while it lasts."""
        with ExitStack() as undo:
            for name, layer in self._plain.items():

                def hook(layer: nn.Module, args: tuple, y: Tensor, name: str = name) -> Tensor:
                    return self._watched(y, lambda g: self._add(name, layer, g))

                undo.callback(layer.register_forward_hook(hook).remove)
            undo.enter_context(self._inputs.watching())
            undo.enter_context(told(self._model, self._stacks, self._expert_inputs.add, self._of_expert))
            self._tokens = undo.enter_context(tokens_counted(self._model, self._stacks))
            yield

    def _of_expert(self, name: str, expert: int, y: Tensor) -> Tensor:
        return self._watched(y, lambda g: self._experts.add(name, expert, g))

    def _watched(self, y: Tensor, add: Callable[[Tensor], None]) -> Tensor:
        """The output, with a hook on its gradient. No parameter asks for one, so the first layers' outputs begin the
        graph; a copy, since what follows may change it in place."""
        y = y if y.requires_grad else y.detach().requires_grad_().clone()
        y.register_hook(add)
        return y

    @torch.no_grad()
    @full_precision()
    def _add(self, name: str, layer: nn.Module, g: Tensor) -> None:
        kernel = layout_of(layer).kernel
        g = g.movedim(-1 - len(kernel), -1) if kernel else g
        rows = g.detach().reshape(-1, g.shape[-1]).to(self._sums[name])
        with torch.autocast(rows.device.type, enabled=False):
            self._sums[name][0].addmm_(rows.mT, rows, alpha=len(rows))

    def end_batch(self, value: Tensor) -> None:
        """The backward pass of a batch's loss."""
        if value.requires_grad:  # a layer that the loss does not depend on starts no graph
            value.backward()
        for name in self._stacks:
            weight = self._tokens[name] ** 2 / self._experts.counts[name].clamp_min(1)
            self._sums[name] += self._experts.sums[name] * weight[:, None, None].to(self._sums[name])
            self._experts.sums[name].zero_()
            self._experts.counts[name].zero_()
            self._all_tokens[name] += self._tokens[name]
            self._tokens[name] = 0
        self._inputs.end_pass()
        self._batches += 1

    def inputs(self) -> dict[str, Tensor]:
        """``C`` by name."""
        tokens = self._all_tokens
        means = {name: C.div_(tokens[name]) for name, C in self._expert_inputs.sums.items() if tokens[name]}
        return self._inputs.means() | means

    def means(self) -> dict[str, Tensor]:
        """Over the batches; a layer whose sum is zero is left out."""
        means = {name: total.div_(self._batches) for name, total in self._sums.items() if total.any()}
        return {name: G if name in self._stacks else G[0] for name, G in means.items()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient; each asks for one again after that did before."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
