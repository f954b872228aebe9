"""What a product's tensors begin with: random rows, and those of a truncation with directions that can learn."""

import math

import torch
from torch import Tensor

from hf_drt.linalg import Truncation, balanced


def kaiming_rows(rank: int, width: int, generator: torch.Generator | None) -> Tensor:
    """``(rank, width)`` from U(-1/sqrt(width), 1/sqrt(width)), the start of LoRA's A.

    The CPU generator is the caller's own, so that the global one is untouched and all processes agree.
    """
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator or torch.Generator().manual_seed(0))


def random_tensor(batch_shape: tuple[int, ...], size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """A tensor of this size whose rows are :func:`kaiming_rows`; of fused experts, ``batch_shape`` (E,), one each."""
    rank, width = size[0], math.prod(size[1:])
    if not batch_shape:
        return kaiming_rows(rank, width, generator).reshape(size)
    generator = generator or torch.Generator().manual_seed(0)
    rows = torch.stack([kaiming_rows(rank, width, generator) for _ in range(*batch_shape)])
    return rows.reshape(*batch_shape, *size)


def without_dead_rows(tensors: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Random rows where those of ``(r, n)`` are zero, or they could never learn."""
    return [
        torch.where(
            tensor.any(dim=1, keepdim=True), tensor, kaiming_rows(len(tensor), tensor.shape[1], generator).to(tensor)
        )
        for tensor in tensors
    ]


def spectral_factors(parts: Truncation, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Balanced factors ``U (m, rank)``, ``V (rank, n)`` of the best rank-``rank`` approximation.

    Where the matrix has fewer than ``rank`` non-zero singular values, both factors of a surplus direction would be
    zero, and so would its gradients for ever. There V gets a random row as long as the smallest kept one, and U a zero
    column: the product is the same and the direction can learn.
    """
    U, V = balanced(parts)
    U, V = _padded(U, rank, dim=1), _padded(V, rank, dim=0)
    threshold = parts.S[0] * torch.finfo(parts.S.dtype).eps * max(U.shape[0], V.shape[1])
    alive = int((parts.S > threshold).sum())
    if alive < rank:
        rows = kaiming_rows(rank - alive, V.shape[1], generator).to(V)
        length = parts.S[alive - 1].sqrt() if alive else rows.new_ones(())
        V[alive:] = rows / rows.norm(dim=1, keepdim=True) * length
        U[:, alive:] = 0
    return U.contiguous(), V.contiguous()


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank
    result = tensor.new_zeros(shape)
    result.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return result
