"""Approximate polar factors by Newton-Schulz iteration: of a matrix ``X = P S Q^T`` the matrix ``P Q^T``.

The quintic ``p(x) = a x + b x^3 + c x^5`` is applied to the singular values five times. Its coefficients are those of
Muon (Jordan et al. 2024): the steepest at zero, and not convergent, so that singular values end between about 0.7 and
1.2; those below about 1e-3 of the Frobenius norm stay below that.
"""

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
_LEAST_NORM = 1e-7


def polar(X: Tensor) -> Tensor:
    """Of ``X (..., m, n)``, in bfloat16, exactly as :class:`torch.optim.Muon` computes it of one matrix.

    About ``5 (2 k^2 l + k^3)`` multiply-adds with k = min(m, n), l = max(m, n).
    """
    Y = X.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        Y = Y.mT
    Y = Y / torch.linalg.matrix_norm(Y, keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(STEPS):
        gram = Y @ Y.mT
        gram = _sum(gram, gram, gram, B, C)
        Y = _sum(Y, gram, Y, A, 1.0)
    return Y.mT if tall else Y


def polar_map(Y: Tensor) -> Tensor:
    """``P (..., r, r)`` with ``Y P`` the polar factor of ``Y (..., m, r)``, r well below m; Y in float32 or better.

    All five steps act on the r x r Gram matrix alone, with which they commute: ``Y_k = Y P_k`` and
    ``A_{k+1} = Q_k A_k Q_k`` where ``Q_k = a + b A_k + c A_k^2``. So Y is met once here and once in the product, not
    fifteen times: ``2 m r^2 + 17 r^3`` multiply-adds in all, where :func:`polar` needs ``10 m r^2 + 5 r^3``.

    As in :func:`polar` a Frobenius norm below 1e-7 counts as 1e-7, and one whose square overflows gives zero.
    """
    gram = Y.mT @ Y
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=_LEAST_NORM**2).sqrt()[..., None, None]
    gram = gram / norm.square()
    product = 1 / norm
    for step in range(STEPS):
        factor = _sum(gram, gram, gram, B, C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        product = product @ factor if step else product * factor
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    return product.masked_fill(norm.isinf(), 0.0)


def _sum(M: Tensor, X: Tensor, Y: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta M + alpha X Y``, rounded once where there is a kernel for it."""
    if M.ndim == 2:
        return torch.addmm(M, X, Y, beta=beta, alpha=alpha)
    if M.ndim == 3:
        return torch.baddbmm(M, X, Y, beta=beta, alpha=alpha)
    return beta * M + alpha * (X @ Y)
