"""A factor fitted to inputs that have changed: against least squares in float64, by other means."""

import pytest
import torch

from hf_drt.linalg import refitted, weighted_truncation


def drawn(samples=200, n=12, m=7, rank=4, directions=12, seed=0):
    """W, its factors, and inputs x and x' as columns: x' is x through a map that loses some of it, and noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, directions, generator=g, dtype=torch.float64)
    x = x @ torch.randn(directions, samples, generator=g, dtype=torch.float64)
    lossy = torch.eye(n, dtype=torch.float64) + 0.4 * torch.randn(n, n, generator=g, dtype=torch.float64)
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    U, S, V, _ = weighted_truncation(W, x @ x.mT, rank)
    return U * S, V, W, x, lossy @ x + 0.1 * x.roll(1, dims=1)


def moments(x, other):
    return other @ other.mT / x.shape[1], x @ other.mT / x.shape[1]


def test_without_shrinkage_it_is_the_least_squares_solution_and_never_worse():
    U, V, W, x, other = drawn()
    fitted = refitted(U, V, W, *moments(x, other), shrinkage=0.0)
    expected = torch.linalg.lstsq((V @ other).mT, (W @ x).mT).solution.mT
    assert torch.allclose(fitted, expected, rtol=1e-8, atol=1e-8)
    assert (fitted @ V @ other - W @ x).norm() < (U @ V @ other - W @ x).norm()


def test_the_solution_is_that_of_every_weighing_of_the_outputs():
    """Of ||L (U V x' - W x)|| for an invertible L: with outputs L W x, U times L."""
    U, V, W, x, other = drawn()
    L = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    fitted = refitted(U, V, W, *moments(x, other), shrinkage=0.0)
    assert torch.allclose(refitted(L @ U, V, L @ W, *moments(x, other), shrinkage=0.0), L @ fitted, atol=1e-8)


def test_shrinkage_is_a_number_of_samples_for_which_the_factor_is_right():
    U, V, W, x, other = drawn(samples=5)
    C, B = moments(x, other)
    a = 0.05
    ridge = (a * (V @ C @ V.mT).diagonal().mean() * x.shape[1]).sqrt()
    hidden = torch.cat([V @ other, ridge * torch.eye(4, dtype=torch.float64)], dim=1)
    outputs = torch.cat([W @ x, ridge * U], dim=1)
    expected = torch.linalg.lstsq(hidden.mT, outputs.mT).solution.mT
    assert torch.allclose(refitted(U, V, W, C, B, shrinkage=a), expected, rtol=1e-8, atol=1e-8)


def test_inputs_that_have_not_changed_leave_the_best_truncation_as_it_is():
    U, V, W, x, _ = drawn()
    U, S, V, _ = weighted_truncation(W, x @ x.mT, 4, shrinkage=0.0)
    assert torch.allclose(refitted(U * S, V, W, *moments(x, x)), U * S, atol=1e-8)


def test_directions_without_samples_keep_the_factor():
    U, V, W, x, _ = drawn(directions=2)
    C, B = moments(x, 2 * x)
    outside = torch.linalg.svd(V @ x).U[:, 2:]
    for shrinkage in (0.01, 0.0):  # the second is singular
        assert torch.allclose(refitted(U, V, W, C, B, shrinkage) @ outside, U @ outside, atol=1e-6)
    assert torch.equal(refitted(U, V, W, 0 * C, 0 * B), U)


def test_float32_is_right_to_its_rounding_and_another_scale_changes_nothing():
    U, V, W, x, other = drawn()
    C, B = moments(x, other)
    exact = refitted(U, V, W, C, B)
    single = refitted(*(tensor.float() for tensor in (U, V, W, C, B)))
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.allclose(refitted(U, V, W, 1e6 * C, 1e6 * B), exact, rtol=1e-9, atol=1e-9)
    assert refitted(U.bfloat16(), V.bfloat16(), W.bfloat16(), C.float(), B.float()).dtype == torch.float32


@pytest.mark.parametrize("B", [torch.zeros(3, 4), torch.full((12, 12), float("nan"))])
def test_moments_that_do_not_fit_are_refused(B):
    U, V, W, x, _ = drawn()
    with pytest.raises(ValueError, match=r"second moments of inputs must be finite and of shape \(12, 12\)"):
        refitted(U, V, W, x @ x.mT, B)


def test_a_negative_shrinkage_is_refused():
    U, V, W, x, _ = drawn()
    with pytest.raises(ValueError, match="shrinkage must be at least 0, got -1"):
        refitted(U, V, W, x @ x.mT, x @ x.mT, -1)
