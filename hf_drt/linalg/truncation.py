"""Truncated SVD by the cheapest of three ways that is accurate enough: randomized, Gram matrix, or a full SVD.

Chosen by size and rank from timings (docs/speed.md): subspace iteration where the rank is a small part of the matrix,
the eigenvectors of the Gram matrix up to half of it, a full SVD for the rest, for small matrices and in float64. The
two cheap ways check what they have lost, and hand over to the next where that is too much.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_drt.linalg.spectral import (
    GRAM_FROM,
    SVD,
    LinAlgError,
    checked,
    factor_qr,
    full_precision,
    svd,
    truncation_error,
)

RANDOMIZED_UP_TO = 1 / 16  # rank over min(m, n)
GRAM_UP_TO = 1 / 2
EXCESS = 0.01  # by how much rounding may raise the squared error of a truncation
GAIN = 0.002  # subspace iteration stops when a round lowers the squared error by less than this share
ROUNDS = 10


class Truncation(NamedTuple):
    """``W ~ U diag(S) Vh`` with ``U (m, r)``, ``S (r,)`` in descending order, ``Vh (r, n)``, and what is left out.

    ``error ()`` is the relative Frobenius error ``||W - U diag(S) Vh||_F / ||W||_F``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor


@torch.no_grad()
@full_precision()
def truncated_svd(W: Tensor, rank: int) -> Truncation:
    """An approximation of ``W (m, n)`` of the given rank, next to the best one in the Frobenius norm.

    The best one is that of the SVD (Eckart and Young 1936). A full SVD attains it; with the Gram matrix the error is at
    most 0.5 % above it by the bound of :func:`_resolved`, with subspace iteration about
    0.2 %.

    Raises:
        ValueError: ``rank`` is outside 1..min(m, n), ``W`` is no matrix, or holds inf or nan.
    """
    limit = min(W.shape)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must lie in 1..{limit} for a matrix of shape {tuple(W.shape)}, got {rank}.")
    A = checked(W)
    for attempt in _cheap_ways(A, rank):
        if (parts := _tried(attempt, A, rank)) is not None:
            return parts
    return _cut(svd(A), rank)


@torch.no_grad()
@full_precision()
def truncated_product(U: Tensor, V: Tensor, rank: int) -> Truncation:
    """:func:`truncated_svd` of the product of ``U (m, r)`` and ``V (r, n)``, from QR of both and an r x r matrix.

    Costs O((m + n) r^2); the m x n product is never formed.
    """
    Q_u, R_u, Q_v, R_v = factor_qr(U, V)
    core = truncated_svd(R_u @ R_v.mT, rank)
    return Truncation(Q_u @ core.U, core.S, core.Vh @ Q_v.mT, core.error)


def projected(Q: Tensor, R: Tensor) -> Truncation:
    """The SVD of ``Q R`` with ``Q (m, r)`` orthonormal and ``R (r, n)``, of which nothing is left out.

    By the eigenvectors E of ``R R^T`` in float64, where that is accurate enough: ``Q E`` and ``E^T R`` give ``Q R``
    whatever they are, so that only values below 1e-7 of the largest lose orthogonality, and not the product.
    """
    if len(R) < GRAM_FROM or R.dtype == torch.float64:
        return truncated_product(Q, R, len(R))
    gram = R.new_zeros(len(R), len(R), dtype=torch.float64)
    for part in R.split(2 * GRAM_FROM, dim=1):  # so that R is not held once more in float64
        part = part.double()
        gram.addmm_(part, part.mT)
    E = torch.linalg.eigh(gram).eigenvectors.flip(1).to(R)
    del gram
    Vh = E.mT @ R
    S = torch.linalg.vector_norm(Vh, dim=1)
    S, order = S.sort(descending=True)
    if not torch.equal(order, torch.arange(len(order), device=order.device)):  # of values next to each other
        E, Vh = E[:, order], Vh[order]
    Vh /= S.clamp_min(torch.finfo(S.dtype).tiny)[:, None]
    return Truncation(Q @ E, S, Vh, S.new_zeros(()))


def balanced(parts: Truncation) -> tuple[Tensor, Tensor]:
    """``(U sqrt(S), sqrt(S) Vh)``: both factors carry the square root of the spectrum (Khodak et al. 2021)."""
    root = parts.S.sqrt()
    return parts.U * root, root[:, None] * parts.Vh


def _cheap_ways(A: Tensor, rank: int) -> list[Callable[[Tensor, int], Truncation | None]]:
    size = min(A.shape)
    if size < GRAM_FROM or A.dtype == torch.float64 or rank > GRAM_UP_TO * size:
        return []
    return [_randomized, _gram] if rank <= RANDOMIZED_UP_TO * size else [_gram]


def _tried(attempt: Callable[[Tensor, int], Truncation | None], A: Tensor, rank: int) -> Truncation | None:
    """One cheap way, of the tall one of A and its transpose; None where it fails or is not accurate enough."""
    tall = A.shape[0] >= A.shape[1]
    scale = A.abs().amax().clamp_min(torch.finfo(A.dtype).tiny)  # squares neither overflow nor vanish
    try:
        parts = attempt((A if tall else A.mT) / scale, rank)
    except LinAlgError:
        return None
    if parts is None or not all(torch.isfinite(part).all() for part in parts):
        return None
    U, S, Vh, error = parts
    left, right = (U, Vh) if tall else (Vh.mT, U.mT)
    return Truncation(left.contiguous(), S * scale, right.contiguous(), error)


def _gram(A: Tensor, rank: int) -> Truncation | None:
    """From the top eigenvectors of ``A^T A``."""
    V = torch.linalg.eigh(A.mT @ A).eigenvectors[:, -rank:]
    return _resolved(A, V, rank)


def _randomized(A: Tensor, rank: int) -> Truncation | None:
    """By subspace iteration from a random start (Halko et al. 2011, Algorithm 4.4), until the error has settled."""
    total = torch.linalg.vector_norm(A, dtype=torch.float64) ** 2
    width = rank + max(rank // 2, 8)
    start = torch.randn(A.shape[0], width, generator=torch.Generator().manual_seed(0)).to(A)
    V = torch.linalg.qr(A.mT @ start).Q
    captured = torch.zeros_like(total)
    for _ in range(ROUNDS):
        P = A @ V
        before, captured = captured, torch.linalg.eigvalsh(_gram_of(P))[-rank:].sum()
        if captured - before <= GAIN * (total - captured):
            return _resolved(A, V, rank)
        V = torch.linalg.qr(A.mT @ P).Q
    return None


def _resolved(A: Tensor, V: Tensor, rank: int) -> Truncation | None:
    """The best truncation of ``A`` within the span of ``V (n, k)``, orthonormal (Rayleigh and Ritz), if it is accurate.

    An error of eps ``sigma_1^2`` in the matrix whose eigenvectors V holds costs at most 2 rank eps ``sigma_1^2`` of the
    squared norm (Ky Fan 1949). That has to be small next to what the truncation leaves out, or a weight of low rank
    would not keep its value.
    """
    P = A @ V
    eigenvalues, rotation = torch.linalg.eigh(_gram_of(P))
    energy, rotation = eigenvalues.flip(0)[:rank], rotation.flip(1)[:, :rank].to(A.dtype)
    total = torch.linalg.vector_norm(A, dtype=torch.float64) ** 2
    rest = total - energy.sum()
    if not 2 * rank * torch.finfo(A.dtype).eps * energy[0] <= EXCESS * rest:
        return None
    S = energy.sqrt().to(A.dtype)
    return Truncation(P @ rotation / S, S, (V @ rotation).mT, (rest / total).sqrt().to(A.dtype))


def _gram_of(P: Tensor) -> Tensor:
    """``P^T P`` in float64."""
    P = P.double()
    return P.mT @ P


def _cut(parts: SVD, rank: int) -> Truncation:
    """The first directions of a full SVD, in memory of their own: a slice would keep all of U alive."""
    U, S, Vh = parts
    U, Vh = (part.clone(memory_format=torch.contiguous_format) for part in (U[:, :rank], Vh[:rank]))
    return Truncation(U, S[:rank].clone(), Vh, S.new_tensor(truncation_error(S, rank)))
