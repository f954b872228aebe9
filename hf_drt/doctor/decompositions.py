"""The decompositions on the device against float64 on the CPU: by every way that the rank can take, and every product.

The best error of a rank is that of the singular values (Eckart and Young 1936), those of a matrix that is made to have
them, so that no decomposition is taken for granted. Tucker-2 lies between the tails of its two unfoldings, the larger
one and the root of the sum of both squares (De Lathauwer et al. 2000).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_drt.doctor.check import Bench, Finding, found, not_tried, raised
from hf_drt.doctor.layers import KINDS, Kind, moved, ranks
from hf_drt.forms import PRODUCTS, Factored, convert, effective_weight, weight_shape
from hf_drt.linalg import (
    GRAM_UP_TO,
    RANDOMIZED_UP_TO,
    Truncation,
    cp,
    effective_rank,
    factored_singular_values,
    gram_singular_values,
    polar,
    polar_map,
    truncated_product,
    truncated_svd,
    tucker2,
)

_ABOVE = 0.006  # by which share a truncation's error may exceed the best one's (hf_drt.linalg.truncation)
_EXACT = 1e-4  # relative error in float32 of what is exact but for rounding
_RANK = 1e-3  # relative error of an effective rank
_POLAR = (0.6, 1.3)  # singular values of a polar factor by five steps


@dataclass(frozen=True)
class _Sizes:
    """Of the matrix, and of the kernel ``(out, channels, k, k)``."""

    matrix: tuple[int, int]
    kernel: tuple[int, int, int, int]


_FULL, _QUICK = _Sizes((640, 512), (48, 32, 3, 3)), _Sizes((192, 160), (16, 12, 3, 3))


def check_decompositions(bench: Bench) -> Iterator[Finding]:
    """One finding for each way to decompose."""
    sizes = _QUICK if bench.quick else _FULL
    for what, look in _ways(sizes, bench.device):
        try:
            yield look(what)
        except Exception as error:  # whatever a device or a library raises
            yield raised(what, error)
    yield from _in_fewer_bits(sizes, bench.device)
    for kind in KINDS:
        for name, product in PRODUCTS.items():
            if product.suits(weight_shape(kind.layer())):
                yield from _product(kind, name, bench.device)


def _ways(sizes: _Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[str], Finding]]]:
    sigma, W = _matrix(sizes.matrix)
    size = len(sigma)
    share = {
        "subspace iteration": RANDOMIZED_UP_TO / 2, "Gram matrix": GRAM_UP_TO / 2, "full": (1 + GRAM_UP_TO) / 2,
    }  # fmt: skip
    for way, part in share.items():
        rank = round(size * part)
        cut = partial(truncated_svd, W.float().to(device), rank)
        yield f"truncated SVD, {way}", partial(_truncated, cut=cut, W=W, best=_tail(sigma, rank))
    low = W[:, : size // 8] @ W[: size // 8]  # of exactly that rank
    cut = partial(truncated_svd, low.float().to(device), size // 8)
    yield "truncated SVD, of a matrix of that rank", partial(_truncated, cut=cut, W=low, best=0.0)
    U, V = W[:, : size // 4], W[: size // 4]
    best = _tail(torch.linalg.svdvals(U @ V), size // 8)
    cut = partial(truncated_product, U.float().to(device), V.float().to(device), size // 8)
    yield "truncated SVD, of two factors", partial(_truncated, cut=cut, W=U @ V, best=best)
    values = partial(gram_singular_values, W.float().to(device))
    yield "effective rank", partial(_rank, values=values, sigma=sigma)
    values = partial(factored_singular_values, U.float().to(device), V.float().to(device))
    yield "effective rank, of two factors", partial(_rank, values=values, sigma=torch.linalg.svdvals(U @ V))
    yield "polar factor", partial(_polar, device=device)
    yield "polar factor, of two factors", partial(_polar_map, device=device)
    yield "Tucker-2", partial(_tucker, shape=sizes.kernel, device=device)
    yield "CP", partial(_cp, shape=sizes.kernel, device=device)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(_random(rows, columns, seed=seed)).Q


def _matrix(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Singular values that fall as those of trained weights do, and a matrix that has them, in float64."""
    sigma = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -0.5
    return sigma, _orthonormal(shape[0], len(sigma), 1) * sigma @ _orthonormal(shape[1], len(sigma), 2).mT


def _tail(sigma: Tensor, rank: int) -> float:
    return (sigma[rank:].square().sum() / sigma.square().sum()).sqrt().item()


def _cpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().cpu().double() for tensor in tensors]


def _off(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def _truncated(what: str, cut: Callable[[], Truncation], W: Tensor, best: float) -> Finding:
    U, S, Vh, stated = _cpu(*cut())
    error, eye = _off(U * S @ Vh, W), torch.eye(len(S), dtype=torch.float64)
    askew = max((U.mT @ U - eye).abs().max().item(), (Vh @ Vh.mT - eye).abs().max().item())
    allowed = best * (1 + _ABOVE) + _EXACT
    holds = error <= allowed and abs(stated.item() - error) <= _EXACT and askew <= 10 * _EXACT
    seen = f"rank {len(S)}: error {error:.5f}, stated {stated.item():.5f}, the best {best:.5f}"
    if askew > 10 * _EXACT:
        seen += f"; singular vectors are not orthonormal, by {askew:.1e}"
    values = {"error": error, "stated": stated.item(), "best": best, "askew": askew}
    return found(what, holds, seen, values)


def _rank(what: str, values: Callable[[], Tensor], sigma: Tensor) -> Finding:
    (S,) = _cpu(values())
    rank, exact = effective_rank(S), effective_rank(sigma)
    return found(
        what,
        abs(rank - exact) <= _RANK * exact,
        f"{rank:.2f}, in float64 {exact:.2f}",
        {"rank": rank, "exact": exact},
    )


def _polar(what: str, device: torch.device) -> Finding:
    X = _random(192, 128, seed=4)
    return _near_orthogonal(what, polar(X.float().to(device)))


def _polar_map(what: str, device: torch.device) -> Finding:
    Y = _random(256, 32, seed=5).float().to(device)
    return _near_orthogonal(what, Y @ polar_map(Y))


def _near_orthogonal(what: str, P: Tensor) -> Finding:
    S = torch.linalg.svdvals(*_cpu(P))
    low, high = S.min().item(), S.max().item()
    holds = _POLAR[0] <= low and high <= _POLAR[1]
    return found(what, holds, f"singular values {low:.2f} to {high:.2f}", {"smallest": low, "largest": high})


def _tucker(what: str, shape: tuple[int, int, int, int], device: torch.device) -> Finding:
    """Of half the channels on both sides."""
    T = _random(*shape, seed=6).flatten(2)
    decay = [torch.arange(1, n + 1, dtype=torch.float64) ** -0.5 for n in shape[:2]]
    T = (T * decay[0][:, None, None] * decay[1][:, None]).reshape(shape)
    out, channels = shape[0] // 2, shape[1] // 2
    before, core, after, stated = _cpu(*tucker2(T.float().to(device), out, channels))
    error = _off(torch.einsum("abhw,oa,bi->oihw", core, after, before), T)
    unfolded = T.flatten(1), T.transpose(0, 1).flatten(1)
    tails = [_tail(torch.linalg.svdvals(M), rank) for M, rank in zip(unfolded, (out, channels), strict=True)]
    low, high = max(tails), sum(tail**2 for tail in tails) ** 0.5
    holds = low - _EXACT <= error <= high + _EXACT and abs(error - stated.item()) <= _EXACT
    seen = f"error {error:.5f}, stated {stated.item():.5f}, bounds {low:.5f} and {high:.5f}"
    return found(what, holds, seen, {"error": error, "stated": stated.item(), "lower": low, "upper": high})


def _cp(what: str, shape: tuple[int, int, int, int], device: torch.device) -> Finding:
    """Of a kernel that is the sum of three orthogonal components, which are the only ones."""
    sizes = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    vectors = [_orthonormal(n, 3, seed=7 + axis) for axis, n in enumerate(shape)]
    T = torch.einsum("r,or,ir,hr,wr->oihw", sizes, *vectors)
    into, height, width, out, stated = _cpu(*cp(T.float().to(device), 3))
    error = _off(torch.einsum("ri,rh,rw,or->oihw", into, height, width, out), T)
    holds = error <= 10 * _EXACT and abs(error - stated.item()) <= _EXACT
    seen = f"error {error:.1e}, stated {stated.item():.1e}, of a kernel of that rank"
    return found(what, holds, seen, {"error": error, "stated": stated.item()})


def _in_fewer_bits(sizes: _Sizes, device: torch.device) -> Iterator[Finding]:
    """A truncation while training has products of float32 computed in fewer bits: decompositions do not."""
    what = "truncated SVD, while products are in TF32 or bfloat16"
    sigma, W = _matrix(sizes.matrix)
    A, rank = W.float().to(device), len(sigma) // 4
    with _reduced(device):
        if _off(_cpu(A @ A.mT)[0], W @ W.mT) < 1e-5:
            yield not_tried(what, f"{device} computes products of float32 in float32 whatever is set")
            return
        try:
            yield _truncated(what, partial(truncated_svd, A, rank), W, _tail(sigma, rank))
        except Exception as error:  # whatever a device raises
            yield raised(what, error)


@contextlib.contextmanager
def _reduced(device: torch.device) -> Iterator[None]:
    backends: dict[str, tuple[Any, str]] = {
        "cuda": (torch.backends.cuda.matmul, "tf32"),
        "cpu": (torch.backends.mkldnn.matmul, "bf16"),  # type: ignore[attr-defined]  # set as it is imported
    }
    if device.type not in backends:
        yield
        return
    backend, fewer = backends[device.type]
    kept, backend.fp32_precision = backend.fp32_precision, fewer
    try:
        yield
    finally:
        backend.fp32_precision = kept


def _product(kind: Kind, name: str, device: torch.device) -> Iterator[Finding]:
    """A product's own decomposition: its error is what it says, and at the largest rank there is none."""
    what = f"product {name}, {kind.name}"
    try:
        W = kind.layer()
        shape, exact = weight_shape(W), effective_weight(W).detach().double()
        for rank in (max(1, PRODUCTS[name].rank_limit(shape) // 4), None):
            rank, rank_in = ranks(PRODUCTS[name], shape, rank)
            conversion = convert(moved(kind.layer(), device), Factored(rank, name, rank_in))
            error = _off(_cpu(effective_weight(conversion.module))[0], exact)
            if not abs(error - conversion.error) <= _EXACT:
                seen = f"rank {rank}: error {error:.5f}, stated {conversion.error:.5f}"
                yield found(what, False, seen, {"error": error, "stated": conversion.error})
                return
        holds = error <= 10 * _EXACT
        values = {"largest rank": rank, "error": error}
        yield found(what, holds, f"error {error:.1e} at its largest rank, {rank}", values)
    except Exception as error:  # of a product's own code
        yield raised(what, error)
