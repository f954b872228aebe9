"""Laws of the update of a pair of factors: it is an update of their product, whatever the factors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_drt.linalg import polar, polar_map
from hf_drt.linalg.polar import STEPS, A, B, C
from hf_drt.optim.pair_rule import pair_update

RATE = 0.02
# The largest singular value that the five steps give: that of the iteration on all of (0, 1].
_grid = torch.linspace(1e-6, 1, 100_001, dtype=torch.float64)
for _ in range(STEPS):
    _grid = _grid * (A + _grid**2 * (B + C * _grid**2))
LARGEST = _grid.max().item()

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**16))
laws = settings(max_examples=40, deadline=None, derandomize=True)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(m: int, n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """L, R and the gradient of W."""
    return seeded(m, r, seed=seed), seeded(r, n, seed=seed + 1), seeded(m, n, seed=seed + 2)


def update(L: Tensor, R: Tensor, G: Tensor, amount: float = RATE) -> tuple[Tensor, Tensor]:
    """Of the gradients that G gives the factors."""
    return pair_update(L, R, G @ R.mT, L.mT @ G, amount)


def spectral(M: Tensor) -> float:
    return torch.linalg.matrix_norm(M, 2).max().item()


def conditioned(r: int, condition: float, seed: int) -> Tensor:
    """An invertible matrix of that condition number."""
    P, Q = (torch.linalg.qr(seeded(r, r, seed=seed + k)).Q for k in (10, 11))
    return P * torch.logspace(0, math.log10(condition), r, dtype=torch.float64) @ Q


def root_inverse(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.rsqrt() @ vectors.mT


def singular_values_iterated(M: Tensor) -> Tensor:
    """The iteration on the singular values, which is what it does to a matrix."""
    P, S, Qh = torch.linalg.svd(M, full_matrices=False)
    S = S / S.norm()
    for _ in range(STEPS):
        S = S * (A + S**2 * (B + C * S**2))
    return P * S @ Qh


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@laws
@given(shapes)
def test_the_change_of_the_product_does_not_depend_on_the_factors(condition, case):
    """L -> L M, R -> M^-1 R is the same W. But for the bound on a step, which is of the factors' own norms."""
    m, n, r, seed = case
    r = min(m, n, r)
    L, R, G = problem(m, n, r, seed)
    M = conditioned(r, condition, seed)
    L2, R2 = L @ M, torch.linalg.solve(M, R)
    dL, dR = update(L, R, G, 1e-9)  # so small that no step meets its bound
    dL2, dR2 = update(L2, R2, G, 1e-9)
    worst = max(torch.linalg.cond(X).item() for X in (L, R, L2, R2))
    tolerance = 1e-9 * max(1e-9, 1e-13 * worst**2)  # the damping's share, and rounding, grow with the Gram matrices
    torch.testing.assert_close(dL2 @ R2, dL @ R, rtol=0, atol=tolerance)
    torch.testing.assert_close(L2 @ dR2, L @ dR, rtol=0, atol=tolerance)


@laws
@given(shapes, st.sampled_from([1e-4, 1.0, 1e4]))
def test_to_first_order_the_product_moves_by_at_most_the_rate_half_of_it_by_each_factor(case, ratio):
    m, n, r, seed = case
    L, R, G = problem(m, n, r, seed)  # of ranks above m and n too
    L, R = L * ratio, R / ratio
    dL, dR = update(L, R, G)
    assert spectral(dL @ R) <= RATE / 2 * LARGEST * (1 + 1e-6)
    assert spectral(L @ dR) <= RATE / 2 * LARGEST * (1 + 1e-6)
    assert spectral(dL @ R + L @ dR) <= RATE * LARGEST * (1 + 1e-6)


@laws
@given(shapes)
def test_it_is_a_descent_on_what_the_gradient_is_of(case):
    m, n, r, seed = case
    L, R, G = problem(m, n, r, seed)
    dL, dR = update(L, R, G)
    assert (G * (dL @ R)).sum() > 0
    assert (G * (L @ dR)).sum() > 0


def test_it_moves_by_the_rate_and_not_by_less():
    """Singular values end at about 1, of momenta that are not singular."""
    L, R, G = problem(60, 50, 8)
    dL, dR = update(L, R, G)
    for change in (dL @ R, L @ dR):
        values = torch.linalg.svdvals(change)[:8] / (RATE / 2)
        assert 0.65 < values.min() < values.max() < LARGEST


def test_beside_a_square_invertible_factor_it_is_muon_on_w():
    """R can reach every W then: the step of L alone is half of Muon's, with the exact polar factor as yardstick and
    with the iteration."""
    L, R, G = problem(30, 12, 12)
    dL, _ = update(L, R, G)
    P, _, Qh = torch.linalg.svd(G, full_matrices=False)
    exact = P @ Qh
    difference = spectral(dL @ R / (RATE / 2) - exact)
    assert difference < 0.32  # singular values between 0.68 and 1.21, where those of the polar factor are 1
    torch.testing.assert_close(dL @ R / (RATE / 2), singular_values_iterated(G), rtol=0, atol=1e-6)
    assert spectral(dL @ R / (RATE / 2) - polar(G).double()) < 0.25  # in bfloat16


def test_whitening_by_cholesky_is_that_by_the_symmetric_root_of_lora_muon():
    L, R, G = problem(30, 24, 6)
    dL, dR = update(L, R, G)
    root_L, root_R = root_inverse(L.mT @ L), root_inverse(R @ R.mT)
    Y, Z = (G @ R.mT) @ root_R, (L.mT @ G).mT @ root_L
    torch.testing.assert_close(dL, RATE / 2 * Y @ polar_map(Y) @ root_R, rtol=0, atol=1e-10)
    torch.testing.assert_close(dR, RATE / 2 * (Z @ polar_map(Z) @ root_L).mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("s", [0.25, 1.0, 8.0])
def test_the_scale_of_an_adapter_takes_no_part_in_what_w_moves_by(s):
    """The gradients of the factors by autograd, of a W with a constant part."""
    L, R, G = problem(9, 8, 3)
    W0 = seeded(9, 8, seed=5)
    leaves = [X.clone().requires_grad_() for X in (L, R)]
    ((W0 + s * leaves[0] @ leaves[1]) * G).sum().backward()
    dL, dR = pair_update(L, R, leaves[0].grad, leaves[1].grad, RATE / s)
    plain = update(L, R, G)
    torch.testing.assert_close(s * dL @ R, plain[0] @ R, rtol=0, atol=1e-9)
    torch.testing.assert_close(s * L @ dR, L @ plain[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_experts_is_each_alone(dtype):
    parts = [problem(12, 10, 4, seed) for seed in (0, 20, 40, 60)]
    L, R, G = (torch.stack([part[k] for part in parts]).to(dtype) for k in range(3))
    R[1, 0] = R[1, 1]  # one is singular
    L[2] = 0  # one is zero
    G[3] = 0  # one has seen no token
    dL, dR = update(L, R, G)
    for k in range(4):
        alone = update(L[k], R[k], G[k])
        found, expected = (dL[k], dR[k]), alone
        if k == 1:  # where nothing but rounding decides on a direction that R has not, the product does not see it
            found, expected = (dL[k] @ R[k], L[k] @ dR[k]), (alone[0] @ R[k], L[k] @ alone[1])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert not dL[3].any()
    assert not dR[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_factor_takes_its_whole_step_and_its_partner_none(dtype):
    L, R, G = (X.to(dtype) for X in problem(12, 10, 4))
    L = torch.zeros_like(L)
    stale = seeded(4, 10, seed=7).to(dtype)  # a momentum of R from before
    dL, dR = pair_update(L, R, G @ R.mT, stale, RATE)
    assert 0.6 < spectral(dL @ R) / (RATE / 2) < LARGEST
    assert not dR.any()
    for zero in pair_update(L, 0 * R, seeded(12, 4).to(dtype), stale, RATE):
        assert not zero.any()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_factors_that_are_singular_or_nearly_so_are_bounded_in_float32(noise, scale):
    """The product and each factor, whatever is in the momenta."""
    for seed in range(8):
        L, R, G = (X.float() for X in problem(64, 48, 16, seed))
        kept = 1 + seed
        R[kept:] = torch.randn(16 - kept, kept, generator=torch.Generator().manual_seed(seed)) @ R[:kept] + (
            noise * R[kept:]
        )
        L, R = L / scale, R * scale
        dL, dR = update(L, R, G)
        assert dL.isfinite().all()
        assert dR.isfinite().all()
        assert spectral((dL @ R).double()) <= RATE / 2 * LARGEST * 1.05
        assert spectral((L @ dR).double()) <= RATE / 2 * LARGEST * 1.05
        assert dL.norm() <= max(L.norm(), 4 * 16 / 2 * RATE / R.norm()) * 1.001
        assert dR.norm() <= max(R.norm(), 4 * 16 / 2 * RATE / L.norm()) * 1.001


def test_the_bound_on_a_partners_step_is_its_own_norm_or_four_times_its_usual_step():
    L, R, G = problem(12, 10, 4)
    R[0] *= 1e-12  # all but singular
    stale = seeded(12, 4, seed=9)  # a momentum that knows nothing of R
    for size in (1.0, 1e-6):
        dL, _ = pair_update(size * L, R, stale, L.mT @ G, RATE)
        usual = RATE / 2 * 4 / R.norm()
        torch.testing.assert_close(dL.norm(), torch.maximum(size * L.norm(), 4 * usual), rtol=1e-6, atol=0)
    equal = torch.linalg.qr(seeded(10, 4)).Q.mT * 3  # of equal singular values
    dL, _ = pair_update(0 * L, equal, stale, L.mT @ G, RATE)
    assert 0.6 < dL.norm() / (RATE / 2 * 4 / equal.norm()) < LARGEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e10, 1e30])
def test_gradients_of_any_size_give_finite_steps(dtype, scale):
    L, R, G = (X.to(dtype) for X in problem(12, 10, 4))
    dL, dR = update(L, R, G * scale)
    assert dL.isfinite().all()
    assert dR.isfinite().all()
    assert spectral(dL @ R) <= RATE / 2 * LARGEST
    if scale == 0:
        assert not dL.any()
        assert not dR.any()
    if scale == 1e10:  # the direction alone counts
        torch.testing.assert_close(dL, update(L, R, G)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_factors_of_any_size_give_finite_steps_in_float32(scale):
    L, R, G = (X.float() for X in problem(12, 10, 4))
    dL, dR = update(L * scale, R / scale, G)
    assert dL.isfinite().all()
    assert dR.isfinite().all()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_ranks_of_one_and_above_both_widths(m, n):
    for r in (1, 4):
        dL, dR = update(*problem(m, n, r))
        assert dL.shape == (m, r)
        assert dR.shape == (r, n)
        assert dL.isfinite().all()
        assert dR.isfinite().all()


def test_what_a_singular_gram_matrix_gets_on_its_diagonal_costs_the_other_directions_nothing():
    """In float32, against float64: directions of a fiftieth of the largest too move by their share."""
    for seed in range(10):
        L, _, G = problem(64, 48, 16, seed)
        P, Q = torch.linalg.qr(seeded(16, 16, seed=seed + 3)).Q, torch.linalg.qr(seeded(48, 16, seed=seed + 4)).Q
        S = torch.tensor([1.0] * 12 + [0.02] * 3 + [0.0], dtype=torch.float64)
        R = P * S @ Q.mT
        full = update(L, R, G)
        low = [X.double() for X in pair_update(*(X.float() for X in (L, R, G @ R.mT, L.mT @ G)), RATE)]
        assert spectral((full[0] - low[0]) @ R) < 0.05 * RATE / 2
        assert spectral(L @ (full[1] - low[1])) < 0.05 * RATE / 2
