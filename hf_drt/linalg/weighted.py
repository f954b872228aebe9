"""Truncation that weighs what is lost by the layer's inputs: the least ``E ||W x - U V x||^2``, not ``||W - U V||_F``.

With the second moments ``C = E[x x^T] (n, n)`` of the inputs, that is ``||(W - U V) S||_F^2`` for any S with
``S S^T = C``. Its optimum is the truncated SVD of ``W S``, undone with ``S^-1`` (reduced-rank regression, Izenman
1975; for networks ASVD, arXiv 2312.05821, and SVD-LLM, arXiv 2403.07378). As ``U_r diag(s) V_r^T S^-1 = U_r U_r^T W``,
that inverse is never needed: W is projected on the leading directions of its outputs, and C may be of any rank.
"""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import GRAM_FROM, LinAlgError, full_precision, singular_values, working_dtype
from hf_drt.linalg.truncation import (
    EXCESS,
    RANDOMIZED_UP_TO,
    Truncation,
    projected,
    truncated_product,
    truncated_svd,
)

SHRINKAGE = 0.01
GRAM_INPUTS = 512  # inputs from which a wide matrix is decomposed by the second moments of its outputs
GRAM_PART = 512  # rows or columns whose products are held at a time: little beside C


def shrunk(C: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """``((1 - a) C / c + a I)`` with ``c = tr C / n`` and a = ``shrinkage``, in float32 or better.

    A few samples say nothing of the directions that they do not have: shrinkage towards ``c I`` (Ledoit and Wolf 2004)
    weighs those by a, not by zero. Divided by c, its diagonal is 1 on average: a truncation does not depend on the
    inputs' scale. Of C = 0, no input at all, it is I.

    Args:
        C: ``(n, n)``, symmetric and positive semidefinite.
        shrinkage: In [0, 1].

    Raises:
        ValueError: C is no square matrix, holds inf or nan or has a negative trace, or ``shrinkage`` is not in [0, 1].
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"second moments of inputs are a matrix (n, n), got a tensor of shape {tuple(C.shape)}.")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage!r}. 0 takes C as it is, 1 ignores it.")
    C = C.detach().to(working_dtype(C.dtype))
    mean = C.diagonal().mean()
    if not torch.isfinite(C).all() or mean < 0:
        raise ValueError(
            f"second moments of inputs, of shape {tuple(C.shape)}, must be finite, with a trace of at least 0; they "
            "hold inf or nan, or are no second moments. Look for inputs that overflow, or truncate by the weight alone."
        )
    if mean == 0:
        return torch.eye(len(C), dtype=C.dtype, device=C.device)
    C = C / mean  # the one copy: large moments are shrunk in it
    C.mul_(1 - shrinkage).diagonal().add_(shrinkage)
    return C


@torch.no_grad()
@full_precision()
def input_root(C: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """``S (n, n)``, lower triangular, with ``S S^T`` = :func:`shrunk` C: its Cholesky factor, or made of its
    eigenvectors where rounding leaves it with an eigenvalue below zero.

    The singular values of ``W S`` are those that a truncation of W, weighed by its inputs, leaves out.

    Raises:
        ValueError: As :func:`shrunk`.
    """
    C = shrunk(C, shrinkage)
    S, failed = torch.linalg.cholesky_ex(C)
    return S if not failed and torch.isfinite(S).all() else _eigen_root(C)


def _eigen_root(C: Tensor) -> Tensor:
    """In float64, on the CPU if need be."""
    A = (C + C.mT).double() / 2
    try:
        values, Q = torch.linalg.eigh(A)
    except LinAlgError:
        values, Q = torch.linalg.eigh(A.cpu())
    return torch.linalg.qr((Q * values.clamp_min(0).sqrt()).mT, mode="r").R.mT.to(C)


@torch.no_grad()
@full_precision()
def weighted_values(W: Tensor, C: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """``s (min(m, n),)``, descending: the singular values of ``W S`` with ``S S^T`` = :func:`shrunk` C. The squares of
    those after the first r, summed, are what :func:`weighted_truncation` to rank r leaves out.

    Of large matrices in float32 by a Gram matrix in float64, right to 1e-7 of the largest; of a W with many more inputs
    than outputs without a second ``n x n`` matrix.

    Raises:
        ValueError: As :func:`shrunk`, or C does not fit W.
    """
    _check_fits(W, C)
    A = W.detach().to(working_dtype(W.dtype))
    if _is_wide(A):
        squares, _ = _of_outputs(A, C, shrinkage, len(A) // 2, vectors=False)
    elif _is_small(A):
        return singular_values(A @ input_root(C, shrinkage).to(A))
    else:
        squares = torch.linalg.eigvalsh(smaller_gram(A, input_root(C, shrinkage).to(A)))
    return squares.flip(0).clamp_min(0).sqrt().to(A)


def _is_wide(A: Tensor) -> bool:
    return A.shape[1] >= max(GRAM_INPUTS, 2 * A.shape[0])


def _is_small(A: Tensor) -> bool:
    """Or in a dtype that no Gram matrix is accurate enough for."""
    return min(A.shape) < GRAM_FROM or A.dtype == torch.float64


def smaller_gram(A: Tensor, S: Tensor) -> Tensor:
    """In float64 ``(A S)^T A S (n, n)``, of a wide matrix ``A S (A S)^T (m, m)``; a part of ``A S`` at a time."""
    tall = A.shape[0] >= A.shape[1]
    parts = (part @ S for part in A.split(GRAM_PART)) if tall else (A @ part for part in S.split(GRAM_PART, dim=1))
    total = A.new_zeros(min(A.shape), min(A.shape), dtype=torch.float64)
    for part in parts:
        part = part.double()
        total.addmm_(*((part.mT, part) if tall else (part, part.mT)))
    return total


def _of_outputs(A: Tensor, C: Tensor, shrinkage: float, rank: int, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of the second moments of a wide matrix's outputs.

    From products in float32, unless what is left out beyond the rank is too little to be told from rounding, as in
    :mod:`hf_drt.linalg.truncation`; then from products in float64.
    """
    for dtype in (A.dtype, torch.float64):
        total = _output_moments(A, C, shrinkage, dtype)
        values, Q = torch.linalg.eigh(total) if vectors else (torch.linalg.eigvalsh(total), total)
        rest = values[: len(A) - rank].clamp_min(0).sum()
        if dtype == torch.float64 or 2 * rank * torch.finfo(dtype).eps * values[-1] <= EXCESS * rest:
            break
    return values, Q


def _output_moments(A: Tensor, C: Tensor, shrinkage: float, dtype: torch.dtype) -> Tensor:
    """``A C A^T (m, m)`` in float64, of ``A C`` in ``dtype``; C shrunk as :func:`shrunk` does, but with no copy."""
    mean = C.diagonal().double().mean().item()
    if not (mean > 0 and C.shape[0] == C.shape[1] and torch.isfinite(C.sum()) and 0 <= shrinkage <= 1):
        A = A.double() @ input_root(C, shrinkage).double()  # says what is wrong with it, or it is zero
        return A @ A.mT
    total = A.new_zeros(len(A), len(A), dtype=torch.float64)
    for some in range(0, A.shape[1], GRAM_PART):
        part = slice(some, some + GRAM_PART)
        if dtype == A.dtype:
            weighed = A @ C[:, part].to(A)
        else:
            weighed = A.new_zeros(len(A), C[0, part].numel(), dtype=dtype)
            for left, right in zip(A.split(GRAM_PART, dim=1), C[:, part].split(GRAM_PART), strict=True):
                weighed.addmm_(left.to(dtype), right.to(dtype))
        weighed.mul_((1 - shrinkage) / mean).add_(A[:, part], alpha=shrinkage)
        total.addmm_(weighed.double(), A[:, part].double().mT)
    return total


def _leading(A: Tensor, C: Tensor, rank: int, shrinkage: float) -> tuple[Tensor, Tensor]:
    """The outputs' leading directions ``Q (m, rank)``, orthonormal, and the relative error of what is left out."""
    wide, limit = _is_wide(A), min(A.shape)
    if not 1 <= rank <= limit or (not wide and (_is_small(A) or rank <= RANDOMIZED_UP_TO * limit)):
        outputs = truncated_svd(A @ input_root(C, shrinkage).to(A), rank)
        return torch.linalg.qr(outputs.U).Q, outputs.error
    if wide:
        squares, Q = _of_outputs(A, C, shrinkage, rank)
        Q = Q[:, -rank:].to(A)
    else:
        S = input_root(C, shrinkage).to(A)
        squares, Q = torch.linalg.eigh(smaller_gram(A, S))
        Q = Q[:, -rank:].to(A)
        if A.shape[0] >= A.shape[1]:  # they are directions of the weighed inputs
            Q = torch.linalg.qr(A @ (S @ Q)).Q
    squares = squares.clamp_min(0)
    tiny = torch.finfo(torch.float64).tiny
    return Q, (squares[: limit - rank].sum() / squares.sum().clamp_min(tiny)).sqrt().to(A)


@torch.no_grad()
@full_precision()
def weighted_truncation(W: Tensor, C: Tensor, rank: int, shrinkage: float = SHRINKAGE) -> Truncation:
    """The matrix ``U diag(S) Vh`` of the given rank with the least ``||(W - U diag(S) Vh) C^(1/2)||_F``, C shrunk.

    Large matrices in float32 are decomposed by a Gram matrix in float64, on the smaller side of W. Beside W, C and the
    result about the memory of C is needed, and of a W with many more inputs than outputs 4 to 5 times ``m^2``.

    Args:
        W: ``(m, n)``.
        C: ``E[x x^T] (n, n)``, or any multiple of it.
        rank: In 1..min(m, n).
        shrinkage: Of C, see :func:`shrunk`.

    Returns:
        Its own SVD; but ``error`` is the weighted one, relative to ``||W C^(1/2)||_F``: the share of the squared norm
        of the outputs that is kept is ``1 - error^2``.

    Raises:
        ValueError: As :func:`shrunk` and :func:`hf_drt.linalg.truncated_svd`, or C does not fit W.
    """
    _check_fits(W, C)
    A = W.detach().to(working_dtype(W.dtype))
    Q, error = _leading(A, C, rank, shrinkage)
    return projected(Q, Q.mT @ A)._replace(error=error)


@torch.no_grad()
@full_precision()
def weighted_product(U: Tensor, V: Tensor, C: Tensor, rank: int, shrinkage: float = SHRINKAGE) -> Truncation:
    """:func:`weighted_truncation` of the product of ``U (m, r)`` and ``V (r, n)``, which is never formed."""
    _check_fits(V, C)
    L, R = (factor.detach().to(working_dtype(factor.dtype)) for factor in (U, V))
    outputs = truncated_product(L, R @ input_root(C, shrinkage).to(R), rank)
    Q = torch.linalg.qr(outputs.U).Q
    return truncated_product(Q, (Q.mT @ L) @ R, rank)._replace(error=outputs.error)


def _check_fits(W: Tensor, C: Tensor) -> None:
    if C.shape[-1:] != W.shape[-1:]:
        raise ValueError(
            f"second moments of shape {tuple(C.shape)} are not those of the inputs of a weight of shape "
            f"{tuple(W.shape)}: (n, n) is needed with n = {W.shape[-1]}."
        )
