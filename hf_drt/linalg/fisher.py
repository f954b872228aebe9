"""Truncation that weighs what is lost by the loss: by the size of inputs, and by how it depends on outputs.

With ``C = E[x x^T]`` of a layer's inputs and ``G = E[g g^T]`` of the loss's gradients at its outputs, a change D of W
raises the loss by about ``1/2 tr(D C D^T G) = 1/2 ||L^T D S||_F^2`` with ``S S^T = C`` and ``L L^T = G``: the
second-order term with a Kronecker-factored Fisher matrix (K-FAC, Martens and Grosse 2015; for truncation Hsu et al.
2022, arXiv 2207.00112, with rows alone). Its optimum is the truncated SVD of ``L^T W S``, undone on both sides.
"""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import full_precision, working_dtype
from hf_drt.linalg.truncation import Truncation, projected
from hf_drt.linalg.weighted import input_root, smaller_gram

OUTPUT_SHRINKAGE = 0.1  # of G: gradients of a few thousand positions say less of a direction than its inputs do


@torch.no_grad()
@full_precision()
def fisher_values(W: Tensor, C: Tensor, G: Tensor) -> Tensor:
    """Singular values of ``L^T W S``, descending, C and G shrunk and scaled to a mean diagonal of 1
    (:func:`hf_drt.linalg.shrunk`): the squares of those after the first r, summed, are what a truncation to rank r
    leaves out."""
    A, S, L = _roots(W, C, G)
    return torch.linalg.eigvalsh(smaller_gram(L.mT @ A, S)).flip(0).clamp_min(0).sqrt().to(A)


@torch.no_grad()
@full_precision()
def fisher_truncation(W: Tensor, C: Tensor, G: Tensor, rank: int) -> Truncation:
    """The matrix of the given rank with the least ``||L^T (W - U diag(S) Vh) S||_F``, C and G shrunk.

    Args:
        W: ``(m, n)``.
        C, G: ``(n, n)`` and ``(m, m)``, or any multiples of them.
        rank: In 1..min(m, n).

    Returns:
        Its own SVD; but ``error`` is the weighted one, relative to ``||L^T W S||_F``.

    Raises:
        ValueError: As :func:`hf_drt.linalg.shrunk`, or the rank does not fit W.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank must lie in 1..{min(W.shape)} for a matrix of shape {tuple(W.shape)}, got {rank}.")
    A, S, L = _roots(W, C, G)
    squares, Q = torch.linalg.eigh(smaller_gram(L.mT @ A, S))
    squares, Q = squares.flip(0).clamp_min(0), Q.flip(1)[:, :rank].to(A)
    # Of the smaller Gram matrix, so that only one of L and S is undone.
    if A.shape[0] < A.shape[1]:
        left, R = torch.linalg.qr(torch.linalg.solve_triangular(L.mT, Q, upper=True))
        right = R @ (Q.mT @ L.mT @ A)
    else:
        left, R = torch.linalg.qr(A @ (S @ Q))
        right = R @ torch.linalg.solve_triangular(S.mT, Q, upper=True).mT
    error = (squares[rank:].sum() / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)).sqrt().to(A)
    return projected(left, right)._replace(error=error)


def _roots(W: Tensor, C: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, S and L in one dtype, float32 or better."""
    A = W.detach().to(working_dtype(W.dtype))
    return A, input_root(C).to(A), input_root(G, OUTPUT_SHRINKAGE).to(A)
