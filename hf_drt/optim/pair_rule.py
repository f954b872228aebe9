"""The update of a pair of factors, judged by what it does to their product.

Of ``W = const + s L R`` with ``L (m, r)`` and ``R (r, n)``, let M_L and M_R be the momenta of the two gradients. Each
is whitened with the Gram matrix of the other factor, made orthogonal, and whitened again::

    dL = -eta / (2 s) msign(M_L C_R^-T) C_R^-1        with R R^T = C_R C_R^T
    dR = -eta / (2 s) C_L^-T msign(C_L^-1 M_R)        with L^T L = C_L C_L^T

C_R^-1 R has orthonormal rows, so that ``s dL R`` is ``eta / 2`` times a matrix whose singular values are 1 up to the
error of the iteration, and likewise ``s L dR``: to first order W moves by a spectral norm of at most eta, half of it by
each factor, whatever the scale of L against R. Under ``L -> L C, R -> C^-1 R`` both products stay the same.

After LoRA-Muon (arXiv 2606.12921), which writes ``(R R^T)^(-1/2)`` for C_R^-1; the two differ by a rotation, which
msign passes on and the second factor takes back, and a Cholesky factor is far cheaper than a root. Riemannian
preconditioning (arXiv 2402.02347) whitens without msign, Spectron (arXiv 2602.12429) bounds the spectral norm without
whitening, LoRA-RITE (arXiv 2410.20625) has Adam's second moment in place of msign.

Leading dimensions are those of a batch, as of fused experts.
"""

import torch
from torch import Tensor

from hf_drt.linalg import polar_map


def pair_update(L: Tensor, R: Tensor, M_L: Tensor, M_R: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """``(dL, dR)``, the step above without its sign: what is taken from L and R.

    A factor that is zero leaves its partner where it is: nothing that the partner does would alter W. One that is all
    but singular could throw its partner far away in directions that W hardly sees: the partner moves by no more than
    its own norm, or by four times what it would beside a factor of equal singular values, whichever is more.

    Args:
        L, R: ``(..., m, r)`` and ``(..., r, n)``, in float32 or better.
        M_L, M_R: Momenta of their gradients, of the same shapes and dtype.
        amount: ``eta / s``.
    """
    gram_L, gram_R = L.mT @ L, R @ R.mT
    norm_L, norm_R = _trace(gram_L).sqrt(), _trace(gram_R).sqrt()
    dL = _within(_half(M_L, gram_R, amount), norm_L, norm_R, amount)
    dR = _within(_half(M_R.mT, gram_L, amount), norm_R, norm_L, amount)
    return dL, dR.mT


def _half(M: Tensor, gram: Tensor, amount: float) -> Tensor:
    """``amount / 2 msign(M C^-T) C^-1`` with ``gram = C C^T``, of ``M (..., m, r)``."""
    inverse = torch.linalg.solve_triangular(_cholesky(gram), _identity(gram), upper=False)
    Y = M @ inverse.mT
    return Y @ (polar_map(Y) @ inverse * (amount / 2))


def _within(step: Tensor, own: Tensor, other: Tensor, amount: float) -> Tensor:
    """A factor's step, shortened to the bound of :func:`pair_update`; ``own`` and ``other`` are the factors' norms."""
    rank, tiny = step.shape[-1], torch.finfo(step.dtype).tiny
    bound = torch.where(other > 0, torch.maximum(own, 2 * rank * amount / other.clamp(min=tiny)), 0.0)
    return step * (bound / torch.linalg.matrix_norm(step, keepdim=True).clamp(min=tiny)).clamp(max=1.0)


def _cholesky(gram: Tensor) -> Tensor:
    """Of a Gram matrix that may be singular, or zero: with as much on the diagonal as rounding needs, and in the rare
    case that this is too little with more. Both are computed, since a look at which is right would wait for the
    device."""
    precision = torch.finfo(gram.dtype)
    scale = (_trace(gram) + precision.tiny**0.5) * _identity(gram)
    (C, failed), (damped, _) = (
        torch.linalg.cholesky_ex(gram + share * scale) for share in (2 * precision.eps, precision.eps**0.5)
    )
    return torch.where(failed[..., None, None] > 0, damped, C)


def _identity(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
