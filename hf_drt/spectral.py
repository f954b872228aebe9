"""Singular values and what is read from them: tensor in, tensor or number out.

All decompositions run in float32 or better, whatever the dtype of the input: half-precision SVD is either missing or
useless. For a factored weight ``W = U V`` every metric comes from r x r matrices, never from the m x n product.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """``W ~ U diag(S) Vh`` with ``U (m, r)``, ``S (r,)`` in descending order and ``Vh (r, n)``."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is decomposed: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def svd(W: Tensor) -> SVD:
    """Thin singular value decomposition of ``W (m, n)``, with a fall-back where the first routine does not converge.

    LAPACK's and cuSOLVER's divide-and-conquer can fail on finite input; the same matrix in float64 on the CPU rarely
    does, and the eigenvectors of the Gram matrix always exist.

    Raises:
        ValueError: ``W`` is no matrix, or holds inf or nan.
    """
    if W.ndim != 2:
        raise ValueError(f"svd needs a matrix, got a tensor of shape {tuple(W.shape)}.")
    if not torch.isfinite(W).all():
        raise ValueError(
            f"svd got a matrix of shape {tuple(W.shape)} that holds inf or nan. The training has diverged: "
            "lower the learning rate, or go back to an earlier checkpoint."
        )
    A = W.detach().to(working_dtype(W.dtype))
    for attempt in (_svd_lapack, _svd_double, _svd_gram):
        try:
            result = attempt(A)
        except torch.linalg.LinAlgError:
            continue
        if all(torch.isfinite(part).all() for part in result):
            return SVD(*(part.to(device=A.device, dtype=A.dtype) for part in result))
    raise ValueError(f"no singular value decomposition of a finite {tuple(W.shape)} matrix converged.")


def _svd_lapack(A: Tensor) -> SVD:
    return SVD(*torch.linalg.svd(A, full_matrices=False))


def _svd_double(A: Tensor) -> SVD:
    return SVD(*torch.linalg.svd(A.to("cpu", torch.float64), full_matrices=False))


def _svd_gram(A: Tensor) -> SVD:
    """SVD from the eigenvectors of the smaller Gram matrix, in float64; accurate for sigma > 1e-8 sigma_1."""
    A = A.to("cpu", torch.float64)
    tall = A.shape[0] >= A.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(A.mT @ A if tall else A @ A.mT)
    S = eigenvalues.flip(0).clamp_min(0).sqrt()
    Q = vectors.flip(1)
    scale = torch.where(S > S[0] * 1e-8, S.reciprocal(), torch.zeros_like(S))
    return SVD(A @ Q * scale, S, Q.mT) if tall else SVD(Q, S, (Q * scale).mT @ A)


def truncated_svd(W: Tensor, rank: int) -> SVD:
    """The best approximation of ``W (m, n)`` of the given rank in the Frobenius norm (Eckart and Young 1936).

    Raises:
        ValueError: ``rank`` is outside 1..min(m, n), or as in :func:`svd`.
    """
    limit = min(W.shape)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must lie in 1..{limit} for a matrix of shape {tuple(W.shape)}, got {rank}.")
    U, S, Vh = svd(W)
    # Clones: a slice would keep the storage of the whole U alive, and safetensors refuses it.
    return SVD(U[:, :rank].clone(), S[:rank].clone(), Vh[:rank].clone())


def factored_svd(U: Tensor, V: Tensor) -> SVD:
    """SVD of the product ``U V`` of ``U (m, r)`` and ``V (r, n)`` by QR of both and an SVD of the r x r core.

    Costs O((m + n) r^2); the m x n product is never formed.
    """
    dtype = working_dtype(U.dtype)
    Q_u, R_u = torch.linalg.qr(U.detach().to(dtype))
    Q_v, R_v = torch.linalg.qr(V.detach().to(dtype).mT)
    core = svd(R_u @ R_v.mT)
    return SVD(Q_u @ core.U, core.S, core.Vh @ Q_v.mT)


def rebalance(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the same product: ``U' V' = U V`` with ``U'^T U' = V' V'^T = diag(sigma)``.

    Balanced factors are the best-conditioned ones, and where L2 on the factors equals the nuclear norm of the
    product (Srebro et al. 2004). ``U (m, r)``, ``V (r, n)``; shapes and dtype stay.
    """
    return tuple(factor.to(U.dtype) for factor in balanced(factored_svd(U, V)))


def balanced(parts: SVD) -> tuple[Tensor, Tensor]:
    """``(U sqrt(S), sqrt(S) Vh)``: both factors carry the square root of the spectrum (Khodak et al. 2021)."""
    root = parts.S.sqrt()
    return parts.U * root, root[:, None] * parts.Vh


def singular_values(W: Tensor) -> Tensor:
    """Singular values of ``W (m, n)``, descending, in float32 or better."""
    A = W.detach().to(working_dtype(W.dtype))
    try:
        S = torch.linalg.svdvals(A)
    except torch.linalg.LinAlgError:
        return svd(A).S
    return S if torch.isfinite(S).all() else svd(A).S


def factored_singular_values(U: Tensor, V: Tensor) -> Tensor:
    """The r singular values of the product of ``U (m, r)`` and ``V (r, n)``, descending, from r x r matrices only."""
    dtype = working_dtype(U.dtype)
    R_u = torch.linalg.qr(U.detach().to(dtype), mode="r").R
    R_v = torch.linalg.qr(V.detach().to(dtype).mT, mode="r").R
    return singular_values(R_u @ R_v.mT)


def effective_rank(S: Tensor) -> float:
    """``exp(-sum p_i log p_i)`` with ``p_i = sigma_i / sum(sigma)``; 0 for the zero matrix (Roy and Vetterli 2007)."""
    total = S.sum()
    if total <= 0:
        return 0.0
    p = S / total
    return math.exp(torch.special.entr(p).sum().item())


def stable_rank(S: Tensor) -> float:
    """``||W||_F^2 / sigma_1^2``; 0 for the zero matrix (Rudelson and Vershynin 2007)."""
    top = S.max()
    return 0.0 if top <= 0 else ((S / top) ** 2).sum().item()


def retained_energy(S: Tensor, rank: int) -> float:
    """Share of ``||W||_F^2`` that a truncation to ``rank`` keeps: ``sum_{i<=r} sigma_i^2 / sum sigma_i^2``."""
    energy = S.double() ** 2
    total = energy.sum()
    return 1.0 if total <= 0 else (energy[:rank].sum() / total).item()


def truncation_error(S: Tensor, rank: int) -> float:
    """Relative Frobenius error of a truncation: ``sqrt(sum_{i>r} sigma_i^2 / sum sigma_i^2)``."""
    energy = S.double() ** 2
    total = energy.sum()
    return 0.0 if total <= 0 else (energy[rank:].sum() / total).sqrt().item()
