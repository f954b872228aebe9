"""CP decomposition of a kernel: a sum of outer products of one vector along each of its axes."""

from math import prod

import torch
from torch import Tensor

from hf_drt.linalg.spectral import full_precision, svd, working_dtype

SWEEPS = 100
TRIAL = 10  # sweeps by which the starts are compared
GAIN = 1e-5  # iteration stops when a sweep lowers the relative error by less than this
RIDGE = 1e-10  # on the normal equations, relative to their mean diagonal


def cp_limit(shape: tuple[int, ...]) -> int:
    """The rank at which any tensor of this shape is met exactly: the product of all sizes but the largest."""
    return prod(shape) // max(shape)


@torch.no_grad()
@full_precision()
def cp(W: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """``W[o,i,h,w] ~ sum_r out[o,r] in[r,i] height[r,h] width[r,w]``, by alternating least squares, in float64.

    It starts from the singular directions of the kernel as a matrix ``(out, in kh kw)``, each right one replaced by its
    nearest outer product, and from random vectors; the better start after a few sweeps goes on. The vectors of a
    component end with the same norm. At :func:`cp_limit` the kernel is met exactly, by construction.

    Args:
        W: ``(out, channels, *kernel)``.
        rank: In 1..cp_limit(W.shape).
        generator: CPU generator of the random start; a fixed seed if None, so that the result is always the same.

    Returns:
        ``in (rank, channels)``, one ``(rank, size)`` for each axis of the kernel, ``out (out, rank)``, and the relative
        Frobenius error, in W's dtype or float32.
    """
    T = W.detach().double()
    size = T.norm()
    if rank >= cp_limit(tuple(T.shape)):
        factors = _exact(T, rank)
    elif size.item() == 0:
        factors = [T.new_zeros(rank, n) for n in T.shape]
    else:
        generator = generator or torch.Generator().manual_seed(0)
        random = [torch.randn(rank, n, generator=generator, dtype=T.dtype).to(T.device) for n in T.shape]
        starts = [_als(T / size, start, TRIAL) for start in (_spectral(T / size, rank), random)]
        factors, _ = min(starts, key=lambda result: result[1])
        factors, _ = _als(T / size, factors, SWEEPS - TRIAL)
        factors[0] = factors[0] * size
    out, *rest = equal_norms(factors)
    error = (T - _product(factors).reshape(T.shape)).norm() / size if size > 0 else size
    return tuple(part.to(working_dtype(W.dtype)).contiguous() for part in (*rest, out.mT, error))


def equal_norms(factors: list[Tensor]) -> list[Tensor]:
    """Factors ``(r, n_k)`` of the same products, whose rows of one component have the same norm."""
    norms = torch.stack([factor.norm(dim=1) for factor in factors])
    mean = norms.log().mean(0).exp()  # 0 where a component is 0
    scales = torch.where(norms > 0, mean / norms, torch.zeros_like(norms))
    return [factor * scale[:, None] for factor, scale in zip(factors, scales, strict=True)]


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """Row-wise Kronecker product of tensors ``(r, n_k)``, ``(r, n_1 n_2 ...)``: the last index runs fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None, :]).flatten(1)
    return product


def _product(factors: list[Tensor]) -> Tensor:
    return factors[0].mT @ khatri_rao(factors[1:])


def _exact(T: Tensor, rank: int) -> list[Tensor]:
    """The fibres along the longest axis, each at its place; components beyond those are zero."""
    longest = max(range(T.ndim), key=lambda axis: T.shape[axis])
    others = [axis for axis in range(T.ndim) if axis != longest]
    places = torch.cartesian_prod(*(torch.arange(T.shape[axis]) for axis in others)).reshape(-1, len(others))
    factors = [T.new_zeros(rank, n) for n in T.shape]
    factors[longest][: len(places)] = T.permute(*others, longest).reshape(-1, T.shape[longest])
    for position, axis in enumerate(others):
        rows = torch.nn.functional.one_hot(places[:, position], T.shape[axis])
        factors[axis][: len(places)] = rows.to(T)
    return factors


def _spectral(T: Tensor, rank: int) -> list[Tensor]:
    """One component to each leading singular direction of ``(out, in kh kw)``, in turn where there are fewer."""
    U, S, Vh = svd(T.flatten(1))
    turn = torch.arange(rank) % len(S)
    factors = [U.mT[turn] * S[turn, None]]
    rest = Vh[turn].reshape(rank, *T.shape[1:])
    for _ in range(T.ndim - 2):  # the nearest outer product of one axis with all later ones, axis by axis
        u, s, vh = torch.linalg.svd(rest.flatten(2), full_matrices=False)
        pick = (torch.arange(rank) // len(S)).clamp_max(s.shape[1] - 1)
        factors.append(u[torch.arange(rank), :, pick])
        rest = vh[torch.arange(rank), pick].reshape(rank, *rest.shape[2:])
    return [*factors, rest]


def _als(T: Tensor, factors: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Sweeps of least squares over the axes, and the relative error that they end with; ``T`` has norm 1."""
    factors, error = list(factors), 1e30
    W = T.flatten(1)
    for _ in range(sweeps):
        factors = equal_norms(factors)
        factors[0] = _solved(factors, 0, khatri_rao(factors[1:]) @ W.mT)
        # W enters only here and above: the other axes work on its image under the first factor.
        image = (factors[0] @ W).reshape(-1, *T.shape[1:])
        for axis in range(1, T.ndim):
            factors[axis] = _solved(factors, axis, _contracted(image, factors, axis))
        last = _contracted(image, factors, T.ndim - 1)
        squared = 1 - 2 * (last * factors[-1]).sum() + _gram(factors, None).sum()
        before, error = error, squared.clamp_min(0).sqrt().item()
        if before - error <= GAIN * before:
            break
    return factors, error


def _contracted(image: Tensor, factors: list[Tensor], axis: int) -> Tensor:
    """``(r, n_axis)``: the image with every other axis multiplied by its factor and summed over."""
    result = image
    for other in range(len(factors) - 1, 0, -1):
        if other != axis:
            factor = factors[other]
            view = [1] * result.ndim
            view[0], view[other] = factor.shape
            result = (result * factor.reshape(view)).sum(other, keepdim=True)
    return result.reshape(len(factors[0]), -1)


def _gram(factors: list[Tensor], without: int | None) -> Tensor:
    grams = [factor @ factor.mT for axis, factor in enumerate(factors) if axis != without]
    return torch.stack(grams).prod(0)


def _solved(factors: list[Tensor], axis: int, right: Tensor) -> Tensor:
    gram = _gram(factors, axis)
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.lstsq(gram + ridge * torch.eye(len(gram)).to(gram), right, driver=_driver(gram)).solution


def _driver(tensor: Tensor) -> str:
    return "gelsd" if tensor.device.type == "cpu" else "gels"
