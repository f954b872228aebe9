"""Singular values and what is read from them: tensor in, tensor or number out.

All decompositions run in float32 or better, whatever the dtype of the input: half-precision SVD is either missing or
useless. For a factored weight ``W = U V`` every metric comes from r x r matrices, never from the m x n product.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch documents it, and declares it private.
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


class SVD(NamedTuple):
    """``W ~ U diag(S) Vh`` with ``U (m, r)``, ``S (r,)`` in descending order and ``Vh (r, n)``."""

    U: Tensor
    S: Tensor
    Vh: Tensor


GRAM_FROM = 128  # min(m, n) from which the Gram matrix is quicker than the matrix itself
GRAM_TOLERANCE = 1e-4


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is decomposed: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, products of float32 matrices are computed in float32, though training may use TF32 or bfloat16 for them.

    Their relative error of 1e-3 would be that of every conversion. Also a decorator.
    """
    mkldnn: Any = torch.backends.mkldnn  # whose attributes are set as it is imported
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    kept = [(backend, backend.fp32_precision) for backend in backends]
    reduced = [(backend, precision) for backend, precision in kept if precision not in ("none", "ieee")]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in reduced:
            backend.fp32_precision = precision


def checked(W: Tensor) -> Tensor:
    """``W``, without its graph, in the dtype in which it is decomposed.

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
    return W.detach().to(working_dtype(W.dtype))


def svd(W: Tensor) -> SVD:
    """Thin singular value decomposition of ``W (m, n)``, with a fall-back where the first routine does not converge.

    LAPACK's and cuSOLVER's divide-and-conquer can fail on finite input; the same matrix in float64 on the CPU rarely
    does, and the eigenvectors of the Gram matrix always exist.

    Raises:
        ValueError: ``W`` is no matrix, or holds inf or nan.
    """
    A = checked(W)
    for attempt in (_svd_lapack, _svd_double, _svd_gram):
        try:
            result = attempt(A)
        except LinAlgError:
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


def singular_values(W: Tensor) -> Tensor:
    """Singular values of ``W (m, n)``, descending, in float32 or better."""
    A = W.detach().to(working_dtype(W.dtype))
    try:
        S = torch.linalg.svdvals(A)
    except LinAlgError:
        return svd(A).S
    return S if torch.isfinite(S).all() else svd(A).S


@full_precision()
def gram_singular_values(W: Tensor) -> Tensor:
    """Singular values of ``W (m, n)`` for its effective rank: from the Gram matrix where that is accurate enough.

    The eigenvalues of ``W^T W`` are wrong by about eps ``sigma_1^2``, so ``sigma_i`` by eps ``sigma_1^2 / sigma_i``. If
    these errors make up more than :data:`GRAM_TOLERANCE` of the sum of all singular values, as where the rank is
    deficient, or if W is small or in float64, :func:`singular_values` is taken.
    """
    A = W.detach()
    if min(A.shape) < GRAM_FROM or A.dtype == torch.float64:
        return singular_values(A)
    A = A.to(working_dtype(A.dtype))
    A = A / A.abs().amax()  # squares neither overflow nor vanish
    try:
        eigenvalues = torch.linalg.eigvalsh(A.mT @ A if A.shape[0] >= A.shape[1] else A @ A.mT)
    except LinAlgError:
        return singular_values(W)
    S = eigenvalues.flip(0).clamp_min(0).sqrt()
    eps = torch.finfo(S.dtype).eps
    wrong = torch.minimum(eps * S[0] ** 2 / S, eps**0.5 * S[0])
    accurate = wrong.sum() <= GRAM_TOLERANCE * S.sum()  # False for nan
    return S * W.detach().abs().amax().to(S) if accurate else singular_values(W)


def factor_qr(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Q_u, R_u, Q_v, R_v`` with ``U V = Q_u (R_u R_v^T) Q_v^T``, for ``U (m, r)`` and ``V (r, n)``."""
    dtype = working_dtype(U.dtype)
    return *torch.linalg.qr(U.detach().to(dtype)), *torch.linalg.qr(V.detach().to(dtype).mT)


@full_precision()
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
