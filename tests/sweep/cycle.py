"""One model through all forms, each held against the one before.

``factored@0 dense@1 adapter@2 factored@3``: from the first truncation on the weights have the rank of the factors, so
that the four phases are one function, and no later change may alter it.
"""

import copy
import math
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from tests.sweep.inputs import tensors

SCHEDULE = "factored@0 dense@1 adapter@2 factored@3"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


class Fault(Exception):
    """A check has failed; the message says where and by how much."""


class Blind(Exception):
    """The outputs do not depend on the target layers, so that nothing can be said of them."""


def run_cycle(model: nn.Module, inputs: dict[str, Any], load: Callable[[Path], nn.Module]) -> dict[str, Any]:
    """Take a model through all forms, and save and load it in the last.

    Args:
        model: Dense, without dropout.
        inputs: Keyword arguments of its forward pass.
        load: Loads what ``save_pretrained`` wrote.

    Returns:
        ``targets`` (layers that changed form), ``reached`` (those with a gradient), ``dense`` (linear layers that
        stayed as they were, counted by reason) and ``error`` (largest relative difference of outputs).

    Raises:
        Blind: The first truncation alters no output.
        Fault: Outputs differ, a gradient is missing or not finite, or the loaded model differs.
        ValueError: No target layer, as :class:`hf_drt.DynamicRank`.
    """
    dense = forward(model, inputs)
    drt = DynamicRank(model, DRTConfig(schedule=SCHEDULE, rank_multiple=1), max_steps=4, seed=0)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    reference: list[Tensor] = []
    gradients, worst = [], 0.0
    for step, phase in enumerate(drt.plan.phases):
        drt.apply(step)
        outputs = forward(model, inputs)
        reference = reference or _altered(dense, outputs)
        worst = max(worst, _compare(reference, outputs, dtype, f"phase {step} ({phase.kind}) differs from phase 0"))
        gradients.append(_gradients(model, outputs, list(drt.targets), f"phase {step} ({phase.kind})"))
    reached = gradients[1]
    for step, found in enumerate(gradients):
        if lost := sorted(reached - found):
            raise Fault(f"phase {step} gives no gradient to {lost[0]} and {len(lost) - 1} more, phase 1 (dense) does")
    loaded = _saved_and_loaded(model, load).to(dtype).train(model.training)
    saved = forward(model, inputs)
    worst = max(worst, _compare(saved, forward(loaded, inputs), dtype, "the loaded model differs from the saved"))
    stayed = Counter(reason for reason in drt.skipped.values() if reason != "outside of the blocks")
    return {"targets": len(drt.targets), "reached": len(reached), "dense": dict(stayed), "error": worst}


def forward(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors of floating point that the model gives, with the same random numbers each time."""
    _forget(model)
    torch.manual_seed(1)
    copied = {name: copy.deepcopy(value) for name, value in inputs.items()}
    outputs = list(tensors(model(**copied)))
    if not outputs:
        raise Fault("the forward pass gives no tensor of floating point")
    return outputs


def _altered(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """The outputs after the first truncation, which must have altered some of them."""
    pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)]
    if all(torch.equal(a, b) for a, b in pairs):
        raise Blind("no output depends on the target layers")
    return [tensor.detach() for tensor in after]


def _forget(model: nn.Module) -> None:
    """Empty the caches that a model keeps between calls (OmDet-Turbo): they hold what older weights made of a text."""
    for value in vars(model).values():
        if isinstance(kept := getattr(value, "cache", None), OrderedDict):
            kept.clear()
            value.current_load = 0


def _compare(expected: list[Tensor], found: list[Tensor], dtype: torch.dtype, what: str) -> float:
    """Largest relative difference of outputs of equal position."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise Fault(f"{what}: outputs of other shapes")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        same = (a == b) | (a.isnan() & b.isnan())  # masks hold inf
        a, b = a.detach()[~same], b.detach()[~same]
        error = ((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() if a.numel() else 0.0
        worst = max(worst, error if math.isfinite(error) else math.inf)
    if worst > TOLERANCE[dtype]:
        raise Fault(f"{what}: relative difference {worst:.1e}, allowed is {TOLERANCE[dtype]:g} in {dtype}")
    return worst


def _gradients(model: nn.Module, outputs: list[Tensor], targets: list[str], where: str) -> set[str]:
    """The targets that a backward pass gives gradients to: to every parameter that they train.

    Outputs are weighted at random, since the plain sum of what a normalisation gives does not depend on its input.
    """
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    terms = [
        (torch.where(t.isfinite(), t, 0) * torch.randn(t.shape, generator=generator, dtype=t.dtype)).mean()
        for t in outputs
        if t.requires_grad and t.numel()
    ]
    if terms:
        sum(terms).backward()
    reached = set()
    for name in targets:
        own = [p for p in _holder(model, name).parameters() if p.requires_grad]
        if any(p.grad is not None and not p.grad.isfinite().all() for p in own):
            raise Fault(f"{where}: the gradient of {name} is not finite")
        if own and all(p.grad is not None for p in own):
            reached.add(name)
    return reached


def _holder(model: nn.Module, name: str) -> nn.Module:
    """The module of a target; of a target that is a parameter, the module that holds it."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def _saved_and_loaded(model: nn.Module, load: Callable[[Path], nn.Module]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(Path(folder))
