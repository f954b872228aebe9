"""Truncation weighed by inputs, against closed forms in float64, autograd and other matrices of the same rank."""

import pytest
import torch
from drawn_moments import moments, random
from torch import Tensor

from hf_drt.linalg import (
    input_root,
    shrunk,
    singular_values,
    truncated_svd,
    truncation_error,
    weighted_product,
    weighted_truncation,
    weighted_values,
)

SHAPES = [(12, 20), (20, 12), (160, 192)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def loss(W: Tensor, P: Tensor, C: Tensor) -> Tensor:
    """``E ||W x - P x||^2``."""
    return ((W - P) @ C * (W - P)).sum()


def matrix(parts) -> Tensor:
    return parts.U * parts.S @ parts.Vh


@shapes
@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_optimum_of_the_symmetric_root_and_of_the_outputs(shape, rank):
    W, C = random(*shape), moments(shape[1])
    P = matrix(weighted_truncation(W, C, rank, shrinkage=0.0))
    values, Q = torch.linalg.eigh(C)
    root, inverse = Q * values.sqrt() @ Q.mT, Q / values.sqrt() @ Q.mT
    U, S, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    torch.testing.assert_close(P, U[:, :rank] * S[:rank] @ Vh[:rank] @ inverse, rtol=1e-8, atol=1e-8)
    tail = torch.linalg.eigvalsh(W @ C @ W.mT)[:-rank].sum()
    torch.testing.assert_close(loss(W, P, C), tail)


@shapes
def test_no_competitor_of_the_same_rank_is_better(shape):
    W, C, rank = random(*shape), moments(shape[1]), 4
    parts = weighted_truncation(W, C, rank, shrinkage=0.0)
    best = loss(W, matrix(parts), C)
    for seed in range(20):
        for size in (1e-3, 1e-1):
            U = parts.U * parts.S + size * random(*parts.U.shape, seed=seed)
            V = parts.Vh + size * random(*parts.Vh.shape, seed=seed + 100)
            assert loss(W, U @ V, C) > best
        U = random(shape[0], rank, seed=seed)  # the best U V with this U
        assert loss(W, U @ torch.linalg.pinv(U) @ W, C) > best
    assert loss(W, matrix(truncated_svd(W, rank)), C) > 1.05 * best


@shapes
def test_gradients_vanish_at_it(shape):
    W, C = random(*shape), moments(shape[1])
    parts = weighted_truncation(W, C, 3, shrinkage=0.0)
    U, V = (parts.U * parts.S).requires_grad_(), parts.Vh.clone().requires_grad_()
    loss(W, U @ V, C).backward()
    scale = loss(W, torch.zeros_like(W), C)
    assert U.grad is not None
    assert V.grad is not None
    assert U.grad.norm() < 1e-8 * scale
    assert V.grad.norm() < 1e-8 * scale


@shapes
def test_the_error_is_that_of_the_outputs_and_of_the_singular_values(shape):
    W, C, rank = random(*shape), moments(shape[1]), 4
    parts = weighted_truncation(W, C, rank)
    of = shrunk(C)
    expected = (loss(W, matrix(parts), of) / loss(W, torch.zeros_like(W), of)).sqrt()
    torch.testing.assert_close(parts.error, expected)
    assert truncation_error(singular_values(W @ input_root(C)), rank) == pytest.approx(expected.item())


@shapes
def test_rotating_the_inputs_rotates_the_result(shape):
    W, C = random(*shape), moments(shape[1])
    Q = torch.linalg.qr(random(shape[1], shape[1], seed=9)).Q
    rotated = matrix(weighted_truncation(W @ Q, Q.mT @ C @ Q, 4))
    torch.testing.assert_close(rotated, matrix(weighted_truncation(W, C, 4)) @ Q)


@shapes
@pytest.mark.parametrize("C", [torch.eye, lambda n: 1e-12 * torch.eye(n), lambda n: torch.zeros(n, n)])
def test_inputs_alike_in_all_directions_weigh_nothing(shape, C):
    W = random(*shape)
    parts, plain = weighted_truncation(W, C(shape[1]), 4), truncated_svd(W, 4)
    torch.testing.assert_close(matrix(parts), matrix(plain))
    torch.testing.assert_close(parts.error, plain.error)


def test_neither_scale_nor_full_rank_matters():
    W, C = random(12, 20), moments(20)
    torch.testing.assert_close(matrix(weighted_truncation(W, 1e20 * C, 4)), matrix(weighted_truncation(W, C, 4)))
    torch.testing.assert_close(matrix(weighted_truncation(W, C, 12)), W)


def test_one_token_keeps_its_output_and_the_rest_as_far_as_it_goes():
    W, x = random(12, 20), random(20, 1, seed=3)
    for shrinkage in (0.0, 1e-6):
        P = matrix(weighted_truncation(W, x @ x.mT, 2, shrinkage))
        torch.testing.assert_close(P @ x, W @ x, rtol=1e-4, atol=1e-4)
    U = W @ x / (W @ x).norm()  # with 1e-6: first this direction of the outputs, then the largest of the rest
    rest = truncated_svd(W - U @ U.mT @ W, 1)
    torch.testing.assert_close(P, U @ U.mT @ W + matrix(rest), rtol=1e-3, atol=1e-3)


def test_fewer_samples_than_inputs_in_float32():
    """C of rank 5, where Cholesky fails without shrinkage: outputs of the samples are met from rank 5 on."""
    W, X = random(30, 40).float(), random(5, 40, seed=2).float()
    C = X.mT @ X
    assert torch.linalg.cholesky_ex(C).info > 0
    for shrinkage in (0.0, 1e-7):
        P = matrix(weighted_truncation(W, C, 6, shrinkage))
        torch.testing.assert_close(X @ P.mT, X @ W.mT, rtol=1e-3, atol=1e-3)
    parts = weighted_truncation(W, C, 6)
    assert parts.U.dtype == torch.float32
    torch.testing.assert_close(
        matrix(parts).double(), matrix(weighted_truncation(W.double(), C.double(), 6)), rtol=1e-3, atol=1e-3
    )


@shapes
def test_of_a_product_without_forming_it(shape):
    U, V, C = random(shape[0], 8), random(8, shape[1], seed=1), moments(shape[1])
    parts, whole = weighted_product(U, V, C, 3), weighted_truncation(U @ V, C, 3)
    torch.testing.assert_close(matrix(parts), matrix(whole))
    torch.testing.assert_close(parts.error, whole.error)
    torch.testing.assert_close(matrix(weighted_product(U, V, C, 8)), U @ V)


@pytest.mark.parametrize(
    ("C", "shrinkage", "message"),
    [
        (torch.ones(4), 0.1, r"a matrix \(n, n\), got a tensor of shape \(4,\)"),
        (torch.ones(3, 4), 0.1, r"a matrix \(n, n\), got a tensor of shape \(3, 4\)"),
        (torch.eye(5), 0.1, r"of shape \(5, 5\) are not those of the inputs .* \(6, 4\): .* n = 4"),
        (torch.full((4, 4), float("nan")), 0.1, r"must be finite, .*Look for inputs that overflow"),
        (-torch.eye(4), 0.1, r"with a trace of at least 0"),
        (torch.eye(4), 1.5, r"shrinkage must be in \[0, 1\], got 1.5\. 0 takes C as it is"),
    ],
)
def test_what_is_no_second_moment_is_refused(C, shrinkage, message):
    with pytest.raises(ValueError, match=message):
        weighted_truncation(random(6, 4), C, 2, shrinkage)


# Of a wide one by its outputs' second moments, of other large ones in float32 by a Gram matrix, of others by the SVD.
LARGE = [(12, 20), (20, 12), (24, 640), (300, 160), (160, 192), (192, 160), (160, 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_the_values_and_the_optimum_of_every_rank(shape, dtype):
    W, C = random(*shape), moments(shape[1])
    s = weighted_values(W.to(dtype), C.to(dtype))
    squares = torch.linalg.eigvalsh(W @ shrunk(C) @ W.mT).flip(0).clamp_min(0)
    k = min(shape)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(s.double(), squares[:k].sqrt(), rtol=tolerance, atol=1e-6)
    for rank in (1, 6, k // 3, k - 1, k):
        parts = weighted_truncation(W.to(dtype), C.to(dtype), rank)
        left = W - matrix(parts).double()
        rest = squares[rank:k].sum()
        torch.testing.assert_close((left @ shrunk(C) * left).sum(), rest, rtol=5e-3, atol=1e-9 * squares[0].item())
        torch.testing.assert_close(parts.error.double(), (rest / squares.sum()).sqrt(), rtol=3e-3, atol=1e-5)
        assert (parts.S.diff() <= 0).all()
        for vectors in (parts.U.mT, parts.Vh):
            unit, wrong = torch.eye(rank, dtype=dtype), 5e-4 if dtype == torch.float32 else 1e-7
            torch.testing.assert_close(vectors @ vectors.mT, unit, rtol=0, atol=wrong)


@pytest.mark.parametrize("C", [torch.zeros(640, 640), moments(640)[:, :1].double() @ moments(640)[:1].double()])
def test_of_wide_matrices_with_no_input_and_with_one(C):
    W, C = random(24, 640), C.double() @ C.double().mT
    torch.testing.assert_close(weighted_values(W, C), torch.linalg.svdvals(W @ input_root(C)), rtol=1e-6, atol=1e-8)
    P = matrix(weighted_truncation(W, C, 5))
    U = torch.linalg.svd(W @ input_root(C)).U
    torch.testing.assert_close(P, U[:, :5] @ U[:, :5].mT @ W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(300, 160), (160, 192), (160, 640)], ids=str)
def test_one_input_that_outweighs_all_hides_nothing_of_the_rest(shape):
    """As the inputs of language models have it: what is left out is 1e-7 of the outputs' squares, which single
    precision does not tell from rounding."""
    W, x = random(*shape).float(), random(shape[1], 1, seed=4)
    C = 1e4 * x @ x.mT + moments(shape[1])
    for shrinkage in (1e-6, 1e-4):
        squares = torch.linalg.eigvalsh(W.double() @ shrunk(C.float().double(), shrinkage) @ W.double().mT).flip(0)
        parts = weighted_truncation(W, C.float(), 80, shrinkage)
        left = W.double() - (parts.U.double() * parts.S.double() @ parts.Vh.double())
        found = (left @ shrunk(C.float().double(), shrinkage) * left).sum()
        torch.testing.assert_close(found, squares[80 : min(shape)].sum(), rtol=0.02, atol=0)
        s = weighted_values(W, C.float(), shrinkage).double()
        torch.testing.assert_close(s[80:].square().sum(), squares[80 : min(shape)].sum(), rtol=0.05, atol=0)


def test_a_wide_matrix_of_low_rank_keeps_its_value():
    """What is left out is too little for the outputs' second moments to tell from rounding."""
    W, C = (random(24, 4) @ random(4, 640, seed=3)).float(), moments(640).float()
    parts = weighted_truncation(W, C, 4)
    torch.testing.assert_close(matrix(parts), W, rtol=1e-4, atol=1e-4)
    assert parts.error < 1e-4


@pytest.mark.parametrize("wrong", [torch.full((640, 640), torch.nan), -torch.eye(640), torch.ones(2, 640)])
def test_what_is_no_second_moment_of_many_inputs_is_refused(wrong):
    with pytest.raises(ValueError, match=r"second moments"):
        weighted_values(torch.randn(24, 640), wrong)
