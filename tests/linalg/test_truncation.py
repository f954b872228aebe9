"""The cheap ways to a truncated SVD and to an effective rank, against numpy in float64, where they are taken."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_drt.forms import Adapter, Dense, Factored, convert, effective_weight
from hf_drt.linalg import truncation
from hf_drt.linalg.spectral import effective_rank, full_precision, gram_singular_values
from hf_drt.linalg.truncation import truncated_product, truncated_svd

LinAlgError = torch.linalg.LinAlgError
SHAPES = [(192, 192), (320, 160), (160, 320)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
RANKS = {"randomized": 8, "Gram matrix": 40, "Gram matrix, half": 80}
ranks = pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix of these singular values, with random singular vectors."""
    U = torch.linalg.qr(random(shape[0], len(sigma), seed=1)).Q
    V = torch.linalg.qr(random(shape[1], len(sigma), seed=2)).Q
    return U * sigma @ V.mT


def decay(power: float, shape: tuple[int, int]) -> Tensor:
    return with_spectrum(torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power, shape)


SPECTRA = {
    "random": lambda shape: 0.02 * random(*shape),
    "slow decay": lambda shape: decay(0.25, shape),
    "decay of trained weights": lambda shape: decay(0.5, shape),
    "one large direction": lambda shape: random(*shape) + 0.3 * random(shape[0], 1, seed=1) @ random(1, shape[1]),
}
spectra = pytest.mark.parametrize("make", SPECTRA.values(), ids=SPECTRA.keys())


def best_error(W: Tensor, rank: int) -> float:
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    return math.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum())


def measured_error(W: Tensor, parts: truncation.Truncation) -> float:
    U, S, Vh = (part.double() for part in parts[:3])
    return ((W.double() - U * S @ Vh).norm() / W.double().norm()).item()


class Calls:
    """Counts the calls of functions of torch.linalg, which go on working unless told to fail."""

    def __init__(self, monkeypatch, *names: str, fail: str | None = None):
        self.count = dict.fromkeys(names, 0)
        for name in names:
            monkeypatch.setattr(torch.linalg, name, self._counted(name, getattr(torch.linalg, name), fail))

    def _counted(self, name, real, fail):
        def call(A, *args, **kwargs):
            self.count[name] += 1
            if fail == "raises":
                raise LinAlgError(f"linalg.{name}: The algorithm failed to converge")
            result = real(A, *args, **kwargs)
            return type(result)([part * math.nan for part in result]) if fail == "gives nan" else result

        return call


# ---- truncated SVD


@shapes
@ranks
@spectra
def test_it_is_nearly_the_best_truncation_without_a_full_svd(monkeypatch, shape, rank, make):
    W = make(shape).float()
    expected = best_error(W, rank)
    calls = Calls(monkeypatch, "svd")
    parts = truncated_svd(W, rank)
    assert calls.count["svd"] == 0
    assert [tuple(part.shape) for part in parts] == [(shape[0], rank), (rank,), (rank, shape[1]), ()]
    assert {part.dtype for part in parts} == {torch.float32}
    error = measured_error(W, parts)
    excess = 0.005 if rank == RANKS["randomized"] else 1e-5
    assert expected * (1 - 1e-6) <= error <= expected * (1 + excess)
    assert parts.error.item() == pytest.approx(error, rel=1e-5)
    for Q in (parts.U, parts.Vh.mT):
        torch.testing.assert_close(Q.mT @ Q, torch.eye(rank), rtol=0, atol=2e-5)
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)[:rank]
    assert (parts.S.diff() <= 0).all()
    np.testing.assert_allclose(parts.S.double(), sigma, rtol=0.04 if rank == RANKS["randomized"] else 1e-4)


@shapes
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@ranks
def test_squares_neither_overflow_nor_vanish(shape, scale, rank):
    W = (scale * random(*shape)).float()
    parts = truncated_svd(W, rank)
    plain = truncated_svd(random(*shape).float(), rank)
    torch.testing.assert_close(parts.S / scale, plain.S, rtol=1e-4, atol=0)
    assert parts.error.item() == pytest.approx(plain.error.item(), rel=1e-5)


LOSSLESS = {
    "deficient": lambda shape: random(shape[0], 30) @ random(30, shape[1], seed=1),
    "steep": lambda shape: decay(3, shape),
    "exponential": lambda shape: with_spectrum(torch.logspace(0, -20, min(shape), dtype=torch.float64), shape),
    "zero": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "one": lambda shape: random(shape[0], 1) @ random(1, shape[1]),
}


@shapes
@pytest.mark.parametrize("rank", [8, 30, 60])
@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS.keys())
def test_what_a_gram_matrix_cannot_resolve_is_left_to_a_full_svd(monkeypatch, shape, rank, make):
    """The Gram matrix would lose directions below sqrt(eps), and a weight of low rank its value."""
    W = make(shape).float()
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    expected = math.sqrt((sigma[rank:] ** 2).sum() / max((sigma**2).sum(), 1e-300))
    calls = Calls(monkeypatch, "svd")
    parts = truncated_svd(W, rank)
    lossy = expected > 0.02
    assert calls.count["svd"] == (0 if lossy else 1)
    U, S, Vh = (part.double() for part in parts[:3])
    error = (W.double() - U * S @ Vh).norm().item() / max(W.double().norm().item(), 1e-300)
    assert error == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert parts.error.item() == pytest.approx(expected, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("how", ["raises", "gives nan"])
@ranks
def test_where_the_cheap_ways_fail_the_full_svd_is_taken(monkeypatch, how, rank):
    W = random(192, 160).float()
    expected = best_error(W, rank)
    calls = Calls(monkeypatch, "eigh", fail=how)
    parts = truncated_svd(W, rank)
    assert calls.count["eigh"] >= 1
    assert measured_error(W, parts) == pytest.approx(expected, rel=1e-6)


def test_where_the_iteration_does_not_settle_the_gram_matrix_is_taken(monkeypatch):
    W = random(192, 160).float()
    monkeypatch.setattr(truncation, "ROUNDS", 1)
    calls = Calls(monkeypatch, "svd")
    assert measured_error(W, truncated_svd(W, 8)) == pytest.approx(best_error(W, 8), rel=1e-5)
    assert calls.count["svd"] == 0


@pytest.mark.parametrize(
    ("W", "rank"),
    [(random(160, 160), 40), (random(160, 160).float(), 81), (random(100, 300).float(), 20)],
    ids=["float64", "more than half the rank", "small"],
)
def test_where_it_does_not_pay_the_svd_is_a_full_one(monkeypatch, W, rank):
    calls = Calls(monkeypatch, "svd", "eigh")
    parts = truncated_svd(W, rank)
    assert calls.count == {"svd": 1, "eigh": 0}
    assert measured_error(W, parts) == pytest.approx(best_error(W, rank), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ranks
def test_half_precision_is_truncated_in_float32(dtype, rank):
    W = random(192, 160).to(dtype)
    parts = truncated_svd(W, rank)
    assert {part.dtype for part in parts} == {torch.float32}
    assert measured_error(W, parts) == pytest.approx(best_error(W, rank), rel=5e-3)


@ranks
def test_the_result_is_the_same_each_time_and_the_global_generator_is_untouched(rank):
    W = random(192, 160).float().requires_grad_()
    state = torch.get_rng_state()
    first, second = truncated_svd(W, rank), truncated_svd(W, rank)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(part.requires_grad for part in first)
    assert all(part.is_contiguous() for part in first)
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in first)


@ranks
def test_a_product_of_large_rank_is_truncated_by_the_cheap_ways(monkeypatch, rank):
    U, V = random(300, 160).float(), random(160, 400, seed=1).float()
    expected = best_error(U @ V, rank)
    calls = Calls(monkeypatch, "svd")
    parts = truncated_product(U, V, rank)
    assert calls.count["svd"] == 0
    error = measured_error(U @ V, parts)
    assert expected * (1 - 1e-6) <= error <= expected * 1.005
    assert parts.error.item() == pytest.approx(error, rel=1e-5)


# ---- layers


@pytest.mark.parametrize("form", [Factored(8), Factored(40), Factored(80)], ids=str)
def test_a_layer_keeps_its_value_through_dense_and_back(form):
    """The second truncation has nothing to leave out: what it is asked to keep, it keeps to rounding."""
    torch.manual_seed(0)
    layer = convert(nn.Linear(192, 160), form).module
    W = effective_weight(layer).clone()
    again = convert(convert(layer, Dense()).module, form)
    assert again.error < 1e-5
    assert ((effective_weight(again.module) - W).norm() / W.norm()).item() < 1e-5


@pytest.mark.parametrize("rank", [8, 40])
def test_a_principal_adapter_keeps_the_value_and_takes_the_top_directions(rank):
    torch.manual_seed(0)
    layer = nn.Linear(192, 160)
    W = layer.weight.detach().clone()
    adapter = convert(layer, Adapter(rank, 16.0, "principal")).module
    assert (effective_weight(adapter) - W).abs().max() < 1e-6
    rest = (adapter.base.norm() / W.norm()).item()
    assert rest == pytest.approx(best_error(W, rank), rel=5e-3)


# ---- effective rank


@shapes
@spectra
def test_an_effective_rank_from_the_gram_matrix_is_right(monkeypatch, shape, make):
    W = make(shape).float()
    sigma = torch.from_numpy(np.linalg.svd(W.double().numpy(), compute_uv=False))
    calls = Calls(monkeypatch, "svdvals")
    S = gram_singular_values(W)
    assert calls.count["svdvals"] == 0
    assert (S.diff() <= 0).all()
    assert effective_rank(S) == pytest.approx(effective_rank(sigma), rel=1e-4)
    assert S.sum().item() == pytest.approx(sigma.sum().item(), rel=1e-4)


@shapes
@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS.keys())
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_an_effective_rank_that_it_cannot_tell_comes_from_the_matrix_itself(monkeypatch, shape, make, scale):
    W = (scale * make(shape)).float()
    sigma = torch.from_numpy(np.linalg.svd(W.double().numpy(), compute_uv=False))
    calls = Calls(monkeypatch, "svdvals")
    assert effective_rank(gram_singular_values(W)) == pytest.approx(effective_rank(sigma), rel=1e-3)
    assert calls.count["svdvals"] == 1


@pytest.mark.parametrize("how", ["raises", "gives nan"])
def test_an_effective_rank_survives_a_failure(monkeypatch, how):
    W = random(192, 160).float()
    sigma = torch.from_numpy(np.linalg.svd(W.double().numpy(), compute_uv=False))

    def eigvalsh(A: Tensor):
        if how == "raises":
            raise LinAlgError("linalg.eigvalsh: The algorithm failed to converge")
        return torch.full((len(A),), math.nan)

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    assert effective_rank(gram_singular_values(W)) == pytest.approx(effective_rank(sigma), rel=1e-5)


# ---- precision of products


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    kept, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = kept


@pytest.mark.parametrize("work", [lambda W: truncated_svd(W, 40), gram_singular_values], ids=["SVD", "values"])
def test_products_are_in_float32_where_training_uses_less(monkeypatch, tf32, work):
    seen = []

    def watched(real):
        return lambda A: (seen.append(tf32.fp32_precision), real(A))[1]

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, watched(getattr(torch.linalg, name)))
    work(random(192, 160).float())
    assert set(seen) == {"ieee"}
    assert tf32.fp32_precision == "tf32"


def test_the_precision_is_back_after_an_error(tf32):
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert tf32.fp32_precision == "tf32"
