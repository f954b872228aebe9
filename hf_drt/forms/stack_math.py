"""Decompositions of fused experts: those of one matrix, for each expert in turn."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_drt.linalg import Truncation


def stacked_truncation(truncate: Callable[..., Truncation], *tensors: Tensor, rank: int) -> Truncation:
    """``truncate(*tensors, rank)`` of matrices; of stacks ``(E, ., .)``, that of each expert.

    The error is that of the whole stack, ``sqrt(sum_e ||W_e - W'_e||_F^2 / sum_e ||W_e||_F^2)``.
    """
    if tensors[0].ndim == 2:
        return truncate(*tensors, rank)
    parts = [truncate(*expert, rank) for expert in zip(*tensors, strict=True)]
    U, S, Vh, error = (torch.stack(kind) for kind in zip(*parts, strict=True))
    kept = S.double().square().sum(-1)
    lost = kept * error.double().square() / (1 - error.double().square())
    total = (kept + lost).sum()
    return Truncation(U, S, Vh, (lost.sum() / total).sqrt().to(error) if total > 0 else error.new_zeros(()))


def of_each(
    factors: Callable[..., tuple[Tensor, Tensor]], parts: Truncation, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``factors(parts, rank, generator)`` of one truncation, or of that of each expert."""
    if parts.S.ndim == 1:
        return factors(parts, rank, generator)
    generator = generator or torch.Generator().manual_seed(0)
    experts = zip(parts.U, parts.S, parts.Vh, strict=True)
    pairs = [factors(Truncation(*expert, parts.error), rank, generator) for expert in experts]
    left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    return left, right
