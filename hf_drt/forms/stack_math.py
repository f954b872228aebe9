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


def joined(one: Truncation, other: Truncation) -> Truncation:
    """The sum of two, as one with the directions of both, sorted by their values; the error is that of the first.

    Directions of one need not be orthogonal to those of the other, so that they are no SVD of the sum.
    """
    S, order = torch.cat([one.S, other.S], -1).sort(-1, descending=True)
    U, V = torch.cat([one.U, other.U], -1), torch.cat([one.Vh, other.Vh], -2)
    columns, rows = order[..., None, :].expand_as(U), order[..., None].expand_as(V)
    return Truncation(U.gather(-1, columns), S, V.gather(-2, rows), one.error)


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
