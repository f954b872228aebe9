"""Decompositions against numpy in float64, metrics against values computed by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_drt.linalg import spectral
from hf_drt.linalg.spectral import (
    effective_rank,
    factored_singular_values,
    gram_singular_values,
    retained_energy,
    singular_values,
    stable_rank,
    svd,
    truncation_error,
)
from hf_drt.linalg.truncation import Truncation, balanced, truncated_product, truncated_svd

SHAPES = [(8, 8), (12, 5), (5, 12), (1, 7), (7, 1), (40, 30)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
LinAlgError = torch.linalg.LinAlgError


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(sigma: list[float], rows: int, columns: int) -> Tensor:
    """A matrix of these singular values, with random singular vectors."""
    U = torch.linalg.qr(matrix(rows, len(sigma), seed=1)).Q
    V = torch.linalg.qr(matrix(columns, len(sigma), seed=2)).Q
    return U @ torch.tensor(sigma, dtype=torch.float64).diag() @ V.mT


def product(parts: spectral.SVD | Truncation) -> Tensor:
    return parts.U @ parts.S.diag() @ parts.Vh


def assert_close(actual, expected, tolerance: float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def assert_orthonormal(Q: Tensor, tolerance: float) -> None:
    """Columns of length 1 at right angles."""
    assert_close(Q.mT @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), tolerance)


# ---- truncated SVD


@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_truncated_svd_is_numpys_up_to_the_sign_of_its_vectors(shape, dtype):
    W = matrix(*shape, dtype=dtype)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for rank in range(1, min(shape) + 1):
        parts = truncated_svd(W, rank)
        assert parts.U.shape == (shape[0], rank)
        assert parts.Vh.shape == (rank, shape[1])
        assert_close(parts.S.double(), S[:rank], tolerance)
        assert_close(product(parts).double(), U[:, :rank] * S[:rank] @ Vh[:rank], 10 * tolerance)
        assert_orthonormal(parts.U, tolerance)
        assert_orthonormal(parts.Vh.mT, tolerance)


@shapes
def test_its_error_is_the_tail_of_the_singular_values(shape):
    W = matrix(*shape)
    sigma = np.linalg.svd(W.numpy(), compute_uv=False)
    for rank in range(1, min(shape) + 1):
        parts = truncated_svd(W, rank)
        tail = math.sqrt((sigma[rank:] ** 2).sum())
        assert (W - product(parts)).norm().item() == pytest.approx(tail, rel=1e-9, abs=1e-9)
        assert parts.error.item() == pytest.approx(tail / W.norm().item(), rel=1e-9, abs=1e-9)


def test_no_other_matrix_of_the_rank_is_nearer():
    W = matrix(10, 7)
    best = (W - product(truncated_svd(W, 3))).norm()
    for seed in range(20):
        other = matrix(10, 3, seed=seed)
        nearest = other @ torch.linalg.lstsq(other, W).solution  # the best one with this column space
        assert (W - nearest).norm() > best


def test_singular_values_come_in_descending_order():
    for values in (truncated_svd(matrix(9, 6), 6).S, singular_values(matrix(9, 6)), svd(matrix(6, 9)).S):
        assert (values.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32(dtype):
    W = matrix(12, 9, dtype=dtype)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    parts = truncated_svd(W, 4)
    assert {part.dtype for part in parts} == {torch.float32}
    assert_close(parts.S.double(), S[:4], 1e-5)
    assert_close(product(parts).double(), U[:, :4] * S[:4] @ Vh[:4], 1e-5)
    assert singular_values(W).dtype == torch.float32
    assert_close(singular_values(W).double(), S, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_keeps_its_dtype(dtype):
    assert {part.dtype for part in truncated_svd(matrix(4, 6, dtype=dtype), 2)} == {dtype}


def test_the_parts_own_their_memory():
    # A slice would keep the whole of U alive, and safetensors would refuse it.
    for part in truncated_svd(matrix(40, 30), 2):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_no_gradient_flows_into_the_parts():
    assert not any(part.requires_grad for part in truncated_svd(matrix(4, 6).requires_grad_(), 2))


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_outside_of_the_matrix_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must lie in 1\.\.5 for a matrix of shape \(5, 9\), got {rank}"):
        truncated_svd(matrix(5, 9), rank)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [svd, singular_values, gram_singular_values, lambda W: truncated_svd(W, 2)])
@pytest.mark.parametrize("shape", [(5, 9), (140, 150)], ids=str)
def test_a_matrix_that_is_not_finite_is_refused(metric, value, shape):
    W = matrix(*shape, dtype=torch.float32)
    W[2, 3] = value
    with pytest.raises(
        ValueError,
        match=rf"a matrix of shape \({shape[0]}, {shape[1]}\) that holds inf or nan\. The training has diverged",
    ):
        metric(W)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"svd needs a matrix, got a tensor of shape \(2, 3, 4\)"):
        svd(matrix(2, 3, 4))


# ---- fall-backs


def failing(times: int, how: str) -> Callable:
    """torch.linalg.svd that fails the given number of times: raises, or gives nan as cuSOLVER can."""
    real, calls = torch.linalg.svd, []

    def fake(A: Tensor, full_matrices: bool = True):
        calls.append(A.dtype)
        if len(calls) > times:
            return real(A, full_matrices=full_matrices)
        if how == "raises":
            raise LinAlgError("linalg.svd: The algorithm failed to converge")
        return tuple(part * math.nan for part in real(A, full_matrices=full_matrices))

    fake.calls = calls
    return fake


DIFFICULT = {
    "tall": lambda: matrix(30, 12),
    "wide": lambda: matrix(12, 30),
    "square": lambda: matrix(15, 15),
    "rank deficient": lambda: matrix(20, 3) @ matrix(3, 16, seed=1),
    "steep": lambda: with_spectrum([10.0 ** (-k) for k in range(6)], 14, 10),
    "zero": lambda: torch.zeros(6, 4, dtype=torch.float64),
    "tiny": lambda: 1e-6 * matrix(9, 7),
    "one row": lambda: matrix(1, 8),
}


@pytest.mark.parametrize("how", ["raises", "gives nan"])
@pytest.mark.parametrize("times", [1, 2], ids=["float64 helps", "Gram matrix helps"])
@pytest.mark.parametrize("make", DIFFICULT.values(), ids=DIFFICULT.keys())
def test_the_result_is_right_where_the_first_routines_fail(monkeypatch, make, times, how):
    W = make().float()
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    fake = failing(times, how)
    monkeypatch.setattr(torch.linalg, "svd", fake)
    for rank in (1, min(W.shape)):
        fake.calls.clear()
        parts = truncated_svd(W, rank)
        assert fake.calls == [torch.float32, torch.float64]
        assert {part.dtype for part in parts} == {torch.float32}
        largest = max(S[0], 1e-30)
        assert_close(parts.S.double() / largest, S[:rank] / largest, 1e-5)
        expected = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert_close(product(parts).double() / largest, expected / largest, 1e-5)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
def test_the_gram_matrix_gives_orthonormal_vectors(monkeypatch, shape):
    monkeypatch.setattr(torch.linalg, "svd", failing(2, "raises"))
    parts = truncated_svd(matrix(*shape), 5)
    assert_orthonormal(parts.U, 1e-8)
    assert_orthonormal(parts.Vh.mT, 1e-8)


def test_where_every_routine_fails_the_matrix_is_named(monkeypatch):
    def eigh(A: Tensor):
        raise LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", failing(2, "raises"))
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(ValueError, match=r"no singular value decomposition of a finite \(4, 3\) matrix converged"):
        svd(matrix(4, 3))


@pytest.mark.parametrize("how", ["raises", "gives nan"])
def test_singular_values_alone_have_the_fall_back_too(monkeypatch, how):
    def svdvals(A: Tensor):
        if how == "raises":
            raise LinAlgError("linalg.svdvals: The algorithm failed to converge")
        return torch.full((min(A.shape),), math.nan, dtype=A.dtype)

    W = matrix(9, 6)
    expected = np.linalg.svd(W.numpy(), compute_uv=False)
    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    assert_close(singular_values(W), expected, 1e-5)


def test_an_error_that_is_no_failure_to_converge_is_not_hidden(monkeypatch):
    def broken(A: Tensor, full_matrices: bool = True):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        svd(matrix(4, 3))


# ---- factors

FACTORS = {
    "random": lambda: (matrix(12, 4), matrix(4, 9, seed=1)),
    "unbalanced": lambda: (1000 * matrix(12, 4), matrix(4, 9, seed=1) / 1000),
    "rank one": lambda: (matrix(6, 1), matrix(1, 8, seed=1)),
    "full rank": lambda: (matrix(5, 5), matrix(5, 7, seed=1)),
    "collinear": lambda: (matrix(12, 1).repeat(1, 3), matrix(3, 9, seed=1)),
    "lora_B is zero": lambda: (torch.zeros(12, 4, dtype=torch.float64), matrix(4, 9, seed=1)),
}
factors = pytest.mark.parametrize("make", FACTORS.values(), ids=FACTORS.keys())


@factors
def test_the_svd_of_factors_is_that_of_their_product(make):
    U, V = make()
    parts = truncated_product(U, V, U.shape[1])
    expected = np.linalg.svd((U @ V).numpy(), compute_uv=False)[: U.shape[1]]
    assert_close(parts.S, expected, 1e-9)
    assert_close(product(parts), U @ V, 1e-9)
    assert_orthonormal(parts.U, 1e-9)
    assert_orthonormal(parts.Vh.mT, 1e-9)


@factors
def test_the_singular_values_of_factors_are_those_of_their_product(make):
    U, V = make()
    expected = np.linalg.svd((U @ V).numpy(), compute_uv=False)[: U.shape[1]]
    assert_close(factored_singular_values(U, V), expected, 1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_truncated_product_is_the_best_of_its_rank(rank):
    U, V = FACTORS["random"]()
    parts = truncated_product(U, V, rank)
    sigma = np.linalg.svd((U @ V).numpy(), compute_uv=False)
    tail = math.sqrt((sigma[rank:] ** 2).sum())
    assert (U @ V - product(parts)).norm().item() == pytest.approx(tail, rel=1e-9)
    assert parts.error.item() == pytest.approx(tail / math.sqrt((sigma**2).sum()), rel=1e-9)


def rebalanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return balanced(truncated_product(U, V, U.shape[1]))


@factors
def test_rebalancing_keeps_the_product_and_makes_both_factors_alike(make):
    U, V = make()
    new_U, new_V = rebalanced(U, V)
    assert (new_U.shape, new_V.shape) == (U.shape, V.shape)
    assert_close(new_U @ new_V, U @ V, 1e-9)
    sigma = np.linalg.svd((U @ V).numpy(), compute_uv=False)[: U.shape[1]]
    assert_close(new_U.mT @ new_U, np.diag(sigma), 1e-9)
    assert_close(new_V @ new_V.mT, np.diag(sigma), 1e-9)


def test_rebalancing_balanced_factors_again_changes_nothing_but_signs():
    U, V = rebalanced(*FACTORS["unbalanced"]())
    again_U, again_V = rebalanced(U, V)
    assert_close(again_U.abs(), U.abs(), 1e-9)
    assert_close(again_V.abs(), V.abs(), 1e-9)


def test_rebalancing_makes_the_sum_of_squares_as_small_as_it_can_be():
    # ||U||^2 + ||V||^2 >= 2 ||U V||_*, with equality for balanced factors only (Srebro et al. 2004).
    U, V = FACTORS["unbalanced"]()
    nuclear = np.linalg.svd((U @ V).numpy(), compute_uv=False).sum()
    new_U, new_V = rebalanced(U, V)
    assert (new_U.norm() ** 2 + new_V.norm() ** 2).item() == pytest.approx(2 * nuclear, rel=1e-9)
    assert (U.norm() ** 2 + V.norm() ** 2).item() > 2.1 * nuclear


def test_metrics_of_factors_never_form_the_product():
    # The product of these would take 160 GB.
    m = n = 200_000
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0])
    U, V = torch.zeros(m, 4), torch.zeros(4, n)
    U[:4] = sigma.diag()
    V[:, -4:] = torch.eye(4)
    S = factored_singular_values(U, V)
    assert_close(S, sigma, 1e-5)
    assert stable_rank(S) == pytest.approx(85 / 64, rel=1e-5)
    assert_close(truncated_product(U, V, 4).S, sigma, 1e-5)
    new_U, new_V = rebalanced(U, V)
    assert (new_U.shape, new_V.shape) == ((m, 4), (4, n))
    assert_close(new_U.norm(dim=0) ** 2, sigma, 1e-4)


# ---- metrics

# Singular values, then effective rank, stable rank, and retained energy at rank 1 and 2, all by hand.
BY_HAND = {
    "one direction": ([5.0], 1.0, 1.0, 1.0, 1.0),
    "one of three": ([2.0, 0.0, 0.0], 1.0, 1.0, 1.0, 1.0),
    "two alike": ([3.0, 3.0], 2.0, 2.0, 0.5, 1.0),
    "four alike": ([0.1] * 4, 4.0, 4.0, 0.25, 0.5),
    # p = 3/4, 1/4: exp(H) = 4 / 3^(3/4)
    "three to one": ([3.0, 1.0], 4 / 3**0.75, 10 / 9, 0.9, 1.0),
    # p = 1/2, 1/4, 1/4: exp(H) = 2^(3/2)
    "two to one to one": ([2.0, 1.0, 1.0], 2**1.5, 1.5, 4 / 6, 5 / 6),
    "zero": ([0.0, 0.0], 0.0, 0.0, 1.0, 1.0),
}
by_hand = pytest.mark.parametrize(("sigma", "effective", "stable", "first", "second"), BY_HAND.values(), ids=BY_HAND)


@by_hand
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_metrics_have_the_values_computed_by_hand_at_every_scale(sigma, effective, stable, first, second, scale):
    S = scale * torch.tensor(sigma)
    assert effective_rank(S) == pytest.approx(effective, rel=1e-5)
    assert stable_rank(S) == pytest.approx(stable, rel=1e-5)
    assert retained_energy(S, 1) == pytest.approx(first, rel=1e-5)
    assert retained_energy(S, 2) == pytest.approx(second, rel=1e-5)
    assert truncation_error(S, 1) == pytest.approx(math.sqrt(1 - first), rel=1e-5, abs=1e-5)
    assert truncation_error(S, 2) == pytest.approx(math.sqrt(1 - second), rel=1e-5, abs=1e-5)


@by_hand
def test_a_matrix_and_its_rotations_have_the_same_metrics(sigma, effective, stable, first, second):
    W = with_spectrum(sigma, 7, 6)
    for S in (singular_values(W), singular_values(W.mT), singular_values(W.flip(0)), svd(W).S):
        assert effective_rank(S) == pytest.approx(effective, rel=1e-6)
        assert stable_rank(S) == pytest.approx(stable, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_lie_between_their_bounds(seed):
    S = singular_values(matrix(12, 8, seed=seed))
    assert 1 <= stable_rank(S) <= 8
    assert 1 <= effective_rank(S) <= 8
    energy = [retained_energy(S, rank) for rank in range(1, 9)]
    assert energy == sorted(energy)
    assert energy[-1] == pytest.approx(1)
    assert 0 < energy[0] < 1


@pytest.mark.parametrize("rank", range(1, 6))
def test_retained_energy_and_truncation_error_are_those_of_the_truncated_matrix(rank):
    W = matrix(9, 5)
    kept = product(truncated_svd(W, rank))
    S = singular_values(W)
    assert retained_energy(S, rank) == pytest.approx((kept.norm() ** 2 / W.norm() ** 2).item(), rel=1e-9)
    assert truncation_error(S, rank) == pytest.approx(((W - kept).norm() / W.norm()).item(), rel=1e-9, abs=1e-9)


def test_energy_is_summed_in_float64():
    # In float32 the squares of small values vanish next to the first one.
    S = torch.cat([torch.ones(1), torch.full((10_000,), 1e-4)])
    assert 1 - retained_energy(S, 1) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-4)


def test_squares_do_not_overflow():
    S = torch.tensor([1e30, 1e30])
    assert stable_rank(S) == pytest.approx(2)
    assert retained_energy(S, 1) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)], ids=str)
def test_the_zero_matrix_has_rank_zero_and_loses_nothing(shape):
    W = torch.zeros(shape)
    S = singular_values(W)
    assert (effective_rank(S), stable_rank(S), retained_energy(S, 1), truncation_error(S, 1)) == (0, 0, 1, 0)
    assert_close(product(truncated_svd(W, 2)), W, 0)
