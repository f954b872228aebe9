"""Truncation that weighs what is lost by the layer's inputs: the least ``E ||W x - U V x||^2``, not ``||W - U V||_F``.

With the second moments ``C = E[x x^T] (n, n)`` of the inputs, that is ``||(W - U V) S||_F^2`` for any S with
``S S^T = C``. Its optimum is the truncated SVD of ``W S``, undone with ``S^-1`` (reduced-rank regression, Izenman
1975; for networks ASVD, arXiv 2312.05821, and SVD-LLM, arXiv 2403.07378). As ``U_r diag(s) V_r^T S^-1 = U_r U_r^T W``,
that inverse is never needed: W is projected on the leading directions of its outputs, and C may be of any rank.
"""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import GRAM_FROM, LinAlgError, full_precision, svd, working_dtype
from hf_drt.linalg.truncation import EXCESS, Truncation, truncated_product, truncated_svd

SHRINKAGE = 0.01
GRAM_INPUTS = 512  # inputs from which a wide matrix is decomposed by the second moments of its outputs


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
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.lerp(C / mean, identity, shrinkage) if mean > 0 else identity


@torch.no_grad()
@full_precision()
def input_root(C: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """``S (n, n)`` with ``S S^T`` = :func:`shrunk` C: its Cholesky factor, or made of its eigenvectors where rounding
    leaves it with an eigenvalue below zero.

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
    return (Q * values.clamp_min(0).sqrt()).to(C)


@torch.no_grad()
@full_precision()
def weighted_directions(W: Tensor, C: Tensor, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """``U (m, k)`` and ``s (k,)`` of the SVD ``U diag(s) V^T`` of ``W S``, k = min(m, n): the outputs' leading
    directions and the root mean squares along them, with ``S S^T`` = :func:`shrunk` C. A truncation of rank r, weighed
    by the inputs, leaves ``u u^T W`` out for each direction u after the first r.

    Of a W with many more inputs than outputs it takes no second ``n x n`` matrix. Large matrices in float32 are
    decomposed by a Gram matrix in float64: their s are right to 1e-7 of the largest.

    Raises:
        ValueError: As :func:`shrunk`, or C does not fit W.
    """
    _check_fits(W, C)
    A = W.detach().to(working_dtype(W.dtype))
    if _is_wide(A):
        values, U = torch.linalg.eigh(_output_moments(A, C, shrinkage))
        return U.flip(1).to(A), values.flip(0).clamp_min(0).sqrt().to(A)
    outputs = A @ input_root(C, shrinkage).to(A)
    if A.shape[0] < A.shape[1] or A.shape[1] < GRAM_FROM or A.dtype == torch.float64:
        parts = svd(outputs)
        return parts.U, parts.S
    double = outputs.double()
    values, V = torch.linalg.eigh(double.mT @ double)
    del double
    s = values.flip(0).clamp_min(0).sqrt().to(A)
    # A direction that rounding alone has made is of no length, and of no weight with its value beside.
    return outputs @ V.flip(1).to(A) / s.clamp_min(torch.finfo(s.dtype).eps * s[0].clamp_min(1e-30)), s


def _is_wide(A: Tensor) -> bool:
    return A.shape[1] >= max(GRAM_INPUTS, 2 * A.shape[0])


def _output_moments(A: Tensor, C: Tensor, shrinkage: float) -> Tensor:
    """``A C A^T (m, m)`` in float64, C shrunk as :func:`shrunk` does, but with no copy of it."""
    mean = C.diagonal().double().mean().item()
    if not (mean > 0 and C.shape[0] == C.shape[1] and torch.isfinite(C.sum()) and 0 <= shrinkage <= 1):
        A = A.double() @ input_root(C, shrinkage).double()  # says what is wrong with it, or it is zero
        return A @ A.mT
    total = A.new_zeros(len(A), len(A), dtype=torch.float64)
    for start in range(0, A.shape[1], GRAM_INPUTS):  # a part of the columns at a time: little beside C is held
        part = slice(start, start + GRAM_INPUTS)
        weighed = (A @ C[:, part].to(A)).mul_((1 - shrinkage) / mean).add_(A[:, part], alpha=shrinkage)
        total.addmm_(weighed.double(), A[:, part].double().mT)
    return total


def _leading_outputs(A: Tensor, C: Tensor, rank: int, shrinkage: float) -> Truncation | None:
    """:func:`weighted_truncation` of a wide matrix, from the second moments of its outputs; None where what is left out
    is too little to be told from rounding, as in :mod:`hf_drt.linalg.truncation`."""
    values, U = torch.linalg.eigh(_output_moments(A, C, shrinkage))
    total, rest = values.sum(), values[:-rank].clamp_min(0).sum()
    if not 2 * rank * torch.finfo(A.dtype).eps * values[-1] <= EXCESS * rest:
        return None
    Q = U[:, -rank:].to(A)
    return truncated_product(Q, Q.mT @ A, rank)._replace(error=(rest / total).sqrt().to(A))


@torch.no_grad()
@full_precision()
def weighted_truncation(W: Tensor, C: Tensor, rank: int, shrinkage: float = SHRINKAGE) -> Truncation:
    """The matrix ``U diag(S) Vh`` of the given rank with the least ``||(W - U diag(S) Vh) C^(1/2)||_F``, C shrunk.

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
    if _is_wide(A) and 1 <= rank < len(A) and (parts := _leading_outputs(A, C, rank, shrinkage)) is not None:
        return parts
    outputs = truncated_svd(A @ input_root(C, shrinkage).to(A), rank)
    Q = torch.linalg.qr(outputs.U).Q
    return truncated_product(Q, Q.mT @ A, rank)._replace(error=outputs.error)


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
