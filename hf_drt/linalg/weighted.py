"""Truncation that weighs what is lost by the layer's inputs: the least ``E ||W x - U V x||^2``, not ``||W - U V||_F``.

With the second moments ``C = E[x x^T] (n, n)`` of the inputs, that is ``||(W - U V) S||_F^2`` for any S with
``S S^T = C``. Its optimum is the truncated SVD of ``W S``, undone with ``S^-1`` (reduced-rank regression, Izenman
1975; for networks ASVD, arXiv 2312.05821, and SVD-LLM, arXiv 2403.07378). As ``U_r diag(s) V_r^T S^-1 = U_r U_r^T W``,
that inverse is never needed: W is projected on the leading directions of its outputs, and C may be of any rank.
"""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import LinAlgError, full_precision, working_dtype
from hf_drt.linalg.truncation import Truncation, truncated_product, truncated_svd

SHRINKAGE = 0.01


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
