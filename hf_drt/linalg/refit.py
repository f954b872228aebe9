"""A factor fitted to inputs that have changed: the least ``E ||U V x' - W x||^2``, with x the inputs as they were.

In a model whose earlier layers are truncated a layer has inputs x' in place of x. With V as it is, the best U for the
outputs that the layer had solves a linear least-squares problem in r unknowns a row (SVD-LLM, arXiv 2403.07378, its
update of U). The solution is the same for every weighing of the outputs. A new V would take n unknowns a row, for which
a calibration has too few samples.
"""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import full_precision, working_dtype

SHRINKAGE = 4.0
"""Of SmolLM2 at 0.6 of its blocks' weights, on 3,584 tokens: the divergence from the dense model on other text fell
from 0.651 to 0.643, 0.620 and 0.611 with 0.2, 1 and 4; on the same text the smallest was best."""


@torch.no_grad()
@full_precision()
def refitted(U: Tensor, V: Tensor, W: Tensor, C: Tensor, B: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """``U + (W B V^T - U K) (K + a k I)^-1 (m, r)`` with ``K = V C V^T``, ``k = tr K / r`` and a = ``shrinkage``: the
    U whose outputs for the inputs x' are nearest to those of W for x, kept near to the one that is there.

    Args:
        U, V: ``(m, r)`` and ``(r, n)``, the factors as they are.
        W: ``(m, n)``, of which they were made.
        C: ``E[x' x'^T] (n, n)``.
        B: ``E[x x'^T] (n, n)``, of the same samples.
        shrinkage: At least 0; in directions of which the samples say nothing U stays.

    Returns:
        In float32 or better.

    Raises:
        ValueError: ``shrinkage`` is below 0, B or C is not ``(n, n)``, or holds inf or nan.
    """
    if not shrinkage >= 0:
        raise ValueError(f"shrinkage must be at least 0, got {shrinkage!r}. 0 takes the samples as they are.")
    n = V.shape[1]
    for moments in (C, B):
        if moments.shape != (n, n) or not torch.isfinite(moments).all():
            raise ValueError(
                f"second moments of inputs must be finite and of shape {(n, n)}, got the shape {tuple(moments.shape)}, "
                "or inf or nan in them. Look for inputs that overflow."
            )
    A, right = U.detach().to(working_dtype(U.dtype)), V.detach().double()
    K = right @ C.to(right) @ right.mT
    missing = W.detach().to(right) @ (B.to(right) @ right.mT) - A.double() @ K
    K.diagonal().add_(shrinkage * K.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(K)
    if failed:  # singular: no ridge, or no input at all
        return (A.double() + missing @ torch.linalg.pinv(K, hermitian=True)).to(A)
    return (A.double() + torch.cholesky_solve(missing.mT, L).mT).to(A)
