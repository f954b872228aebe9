"""What a method has beside its training arguments: ideas that are tried here, and are no part of the package.

- ``guide``: ``{"share": s}``. For the first share of a run each factored layer also has its dense weight, and gives
  ``alpha W x + (1 - alpha) U V x`` with alpha falling from 1 to 0; both are trained (self-guided training, Wei et al.
  2024, arXiv 2406.16450). W is trained by Muon, under the scheduled rate of the factors.
- ``profile``: ``{"steps": n, "of": "change" or "gradient"}``. A dense copy is trained for n steps; how the spectrum of
  what its weights have changed by, or of its last gradients, falls decides the rank of each layer, all ranks together
  costing what the rank of the settings would.
- ``project``: ``{"k": k, "period": p, "sharpness": beta}``. Gradients of dense layers are projected on the k leading
  directions of their inputs (:class:`hf_drt.covariance.GradientProjection`).
- ``widened``: true. Where the CPU has no instructions for products in bfloat16 they are computed as those would
  (:mod:`widened`): its record says ``emulated``, and its seconds say nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_drt import DRTTrainer, DRTTrainingArguments
from hf_drt.compress.allocation import allocate
from hf_drt.covariance import GradientProjection
from hf_drt.optim import unwrap

RANK_STEP = 8  # ranks that a profile gives are multiples of it


class Guide(TrainerCallback):
    """Dense weights beside the factors, which fade out."""

    def __init__(self, model: nn.Module, names: list[str], share: float, rate: float):
        self.share, self.rate = share, rate
        self.weights = {name: nn.Parameter(model.get_submodule(name).weight.detach().clone()) for name in names}
        self.muon = [torch.optim.Muon([w], lr=rate, weight_decay=0.0) for w in self.weights.values()]
        self.alpha = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.layers = {name: model.get_submodule(name) for name in self.weights}
        for name, layer in self.layers.items():
            layer.forward = self._forward(layer, self.weights[name])
        self.end = max(1, round(self.share * state.max_steps))

    def _forward(self, layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            low = F.linear(F.linear(x, layer.V), layer.U)
            out = low + self.alpha * (F.linear(x, weight) - low)
            return out if layer.bias is None else out + layer.bias

        return forward

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.layers:
            return
        self.alpha = 1 - state.global_step / self.end
        if self.alpha <= 0:
            for layer in self.layers.values():
                del layer.forward
            self.layers = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if not self.layers:
            return
        # on_optimizer_step comes after the step, and before the scheduler's.
        ratio = next(g["lr"] / g["initial_lr"] for g in optimizer.param_groups)
        for muon, weight in zip(self.muon, self.weights.values(), strict=True):
            muon.param_groups[0]["lr"] = self.rate * ratio
            muon.step()
            weight.grad = None


class Project(TrainerCallback):
    """A rule of projection through a run; to be added to a trainer that is made, after its own changes of form."""

    def __init__(self, model: nn.Module, names: list[str], options: dict[str, Any]):
        self.rule = GradientProjection(model, names, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.rule.install(unwrap(optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rule.begin_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rule.leave()


def profiled_ranks(
    model: nn.Module,
    names: list[str],
    data: dict[str, Any],
    settings: dict[str, Any],
    rate: float,
    profile: dict[str, Any],
) -> dict[str, int]:
    """Patterns of the layers' names and their ranks, after some steps of dense training of ``model``.

    Args:
        model: Is trained.
        names: Of its target layers.
        data: Of the trainer: dataset, collator.
        settings: Training arguments of the method, whose schedule, length and rank are replaced or read.
        rate: Of Muon.
        profile: ``steps``, and ``of``.
    """
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    plain = {key: value for key, value in settings.items() if not key.startswith("drt_")}
    dense = {"drt_schedule": "dense@0", "drt_matrix_optimizer": "muon", "drt_matrix_lr": rate}
    args = DRTTrainingArguments(**plain | dense | {"max_steps": profile["steps"], "warmup_steps": 0})
    gradients: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            for name in names:
                gradient = model.get_submodule(name).weight.grad
                gradients[name] = gradients.get(name, 0) + gradient

    DRTTrainer(model=model, args=args, callbacks=[Keep()], **data).train()
    if profile["of"] == "gradient":
        seen = gradients
    else:
        seen = {name: model.get_submodule(name).weight.detach() - before[name] for name in names}
    return ranks_under_budget(seen, settings["drt_rank_ratio"])


def ranks_under_budget(matrices: dict[str, Tensor], ratio: float) -> dict[str, int]:
    """Ranks that keep most of the energy of all matrices, each relative to its own, at the cost of a common ratio."""
    curves, budget = [], 0
    for matrix in matrices.values():
        energy = torch.linalg.svdvals(matrix.float()).square()
        left = 1 - energy.cumsum(0) / energy.sum()
        size = sum(matrix.shape)
        curves.append([(rank * size, float(left[rank - 1])) for rank in range(RANK_STEP, min(matrix.shape), RANK_STEP)])
        budget += round(ratio * min(matrix.shape)) * size
    chosen = allocate(curves, budget)
    ranks = [
        curve[option][0] // sum(m.shape) for curve, option, m in zip(curves, chosen, matrices.values(), strict=True)
    ]
    return {f"^{name.replace('.', '[.]')}$": rank for name, rank in zip(matrices, ranks, strict=True)}
