"""Polar factors by Newton-Schulz: against torch.optim.Muon's own step, and against the iteration written out."""

import pytest
import torch
from torch import Tensor, nn

from hf_drt.linalg import polar, polar_map
from hf_drt.linalg.polar import STEPS, A, B, C

SHAPES = [(12, 12), (40, 7), (7, 40), (1, 9), (9, 1), (1, 1), (96, 33)]


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def of_muon(X: Tensor) -> Tensor:
    """What torch.optim.Muon makes of a gradient: the weight, from zero, after a step of rate 1."""
    weight = nn.Parameter(torch.zeros_like(X))
    weight.grad = X.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="original").step()
    return -weight.detach() / max(1.0, X.shape[0] / X.shape[1]) ** 0.5


def of_polar(X: Tensor) -> Tensor:
    """The same step with :func:`polar`."""
    rate = max(1.0, X.shape[0] / X.shape[1]) ** 0.5
    return torch.zeros_like(X).add_(polar(X), alpha=-rate).neg() / rate


def written_out(X: Tensor) -> Tensor:
    """The iteration on the matrix itself, in float64."""
    Y = X.double()
    Y = Y / torch.linalg.matrix_norm(Y, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = Y @ Y.mT
        Y = A * Y + B * gram @ Y + C * gram @ gram @ Y
    return Y


def rank_deficient(m: int, n: int, rank: int) -> Tensor:
    return seeded(m, rank) @ seeded(rank, n, seed=1)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_is_that_of_torch_muon_bit_for_bit(shape, scale):
    X = seeded(*shape) * scale
    assert torch.equal(of_polar(X), of_muon(X))


@pytest.mark.parametrize("X", [torch.zeros(6, 4), rank_deficient(24, 16, 3)], ids=["zero", "rank deficient"])
def test_polar_of_singular_matrices_is_that_of_torch_muon(X):
    assert torch.equal(of_polar(X), of_muon(X))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_of_a_batch_is_that_of_each_matrix(shape):
    batch = seeded(3, *shape)
    batch[1] = 0
    assert torch.equal(polar(batch), torch.stack([polar(X) for X in batch]))
    # For more dimensions there is no kernel that rounds to bfloat16 once.
    torch.testing.assert_close(polar(batch[None]), polar(batch)[None], rtol=0, atol=0.06)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(40, 7), (12, 12), (9, 1), (3, 8), (1, 1), (2, 40, 7)], ids=str)
def test_polar_map_gives_the_iteration_on_the_whole_matrix(shape, scale):
    """m < r too, where the Gram matrix is singular."""
    Y = seeded(*shape, dtype=torch.float64) * scale
    torch.testing.assert_close(Y @ polar_map(Y), written_out(Y), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(Y.float() @ polar_map(Y.float()), written_out(Y).float(), rtol=0, atol=2e-4)


def test_polar_map_of_a_batch_is_that_of_each_matrix():
    batch = seeded(3, 20, 5)
    batch[1] = 0
    torch.testing.assert_close(polar_map(batch), torch.stack([polar_map(Y) for Y in batch]), rtol=1e-5, atol=1e-5)


def test_singular_values_end_between_070_and_121():
    """But those below a thousandth of the norm."""
    S = torch.logspace(-2, 0, 64, dtype=torch.float64)
    Q = torch.linalg.qr(seeded(200, 64, dtype=torch.float64)).Q
    values = torch.linalg.svdvals((Q * S) @ polar_map(Q * S))
    assert 0.68 < values.min() < values.max() < 1.21


def test_rank_deficient_input_has_no_part_outside_its_rank():
    Y = rank_deficient(40, 8, 3)
    values = torch.linalg.svdvals(Y @ polar_map(Y))
    assert values[2] > 0.6
    assert values[3] < 1e-2  # rounding of the Gram matrix, which the steepest slope at zero enlarges
    torch.testing.assert_close(Y @ polar_map(Y), written_out(Y).float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero(dtype):
    Y = torch.zeros(2, 6, 3, dtype=dtype)
    assert torch.equal(Y @ polar_map(Y), Y)
    assert not polar(Y).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e18, 1e30])
def test_both_fade_and_overflow_at_the_same_norms(scale):
    """A momentum that decays, as of an expert without tokens, moves its weights as long in one form as in another; and
    a norm whose square overflows moves none, as under torch.optim.Muon."""
    Y = seeded(20, 5) * scale
    small, large = (torch.linalg.matrix_norm(Z.double()) for Z in (Y @ polar_map(Y), polar(Y)))
    torch.testing.assert_close(small, large, rtol=0.05, atol=0)


def test_one_matrix_that_overflows_leaves_the_others_of_its_batch_alone():
    batch = torch.stack([seeded(20, 5), seeded(20, 5) * 1e30])
    found = polar_map(batch)
    torch.testing.assert_close(found[0], polar_map(batch[0]), rtol=1e-5, atol=1e-5)
    assert not found[1].any()


@pytest.mark.parametrize("function", [polar, polar_map])
def test_what_is_not_a_number_is_not_hidden(function):
    Y = seeded(6, 3)
    Y[0, 0] = float("nan")
    assert function(Y).isnan().any()
