"""Tucker-2 decomposition of a kernel: low rank along its output and its input channels."""

import torch
from torch import Tensor

from hf_drt.linalg.spectral import full_precision, working_dtype

ROUNDS = 20
GAIN = 1e-6  # iteration stops when a round raises the share of the squared norm that is kept by less than this


@torch.no_grad()
@full_precision()
def tucker2(W: Tensor, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``W[o,i,...] ~ sum_ab out[o,a] core[a,b,...] in[b,i]`` with orthonormal ``out`` and ``in``.

    Starts from the truncated higher-order SVD and goes on by higher-order orthogonal iteration (De Lathauwer et al.
    2000), in float64. Both ranks of a kernel that has them are found exactly.

    Args:
        W: ``(out, channels, *kernel)``.
        rank_out, rank_in: At most out and channels.

    Returns:
        ``in (rank_in, channels)``, ``core (rank_out, rank_in, *kernel)``, ``out (out, rank_out)``, and the relative
        Frobenius error, in W's dtype or float32.
    """
    T = W.detach().double().flatten(2)
    total = T.square().sum()
    before = _leading(T.transpose(0, 1).flatten(1), rank_in)
    out, before, core = _round(T, before, rank_out)
    kept = torch.zeros_like(total)
    for _ in range(ROUNDS - 1):
        last, kept = kept, core.square().sum()
        if kept - last <= GAIN * total:
            break
        out, before, core = _round(T, before, rank_out)
    rest = T - torch.einsum("abk,oa,ib->oik", core, out, before)
    error = rest.norm() / total.sqrt() if total > 0 else total
    core = core.reshape(rank_out, rank_in, *W.shape[2:])
    dtype = working_dtype(W.dtype)
    return (
        before.mT.to(dtype).contiguous(), core.to(dtype).contiguous(), out.to(dtype).contiguous(), error.to(dtype)
    )  # fmt: skip


def _round(T: Tensor, before: Tensor, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best output directions for the input's ``before``, the best input's for those, and the core for both."""
    out = _leading(torch.einsum("oik,ib->obk", T, before).flatten(1), rank_out)
    before = _leading(torch.einsum("oik,oa->iak", T, out).flatten(1), before.shape[1])
    return out, before, torch.einsum("oik,oa,ib->abk", T, out, before)


def _leading(A: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of ``A (n, m)``, ``(n, rank)``: always orthonormal, also beyond A's rank."""
    return torch.linalg.eigh(A @ A.mT).eigenvectors.flip(1)[:, :rank]
