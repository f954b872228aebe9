"""Truncation weighed on both sides, against the closed form in float64, autograd and other matrices of its rank."""

import pytest
import torch
from drawn_moments import moments, random
from torch import Tensor

from hf_drt.linalg import fisher_truncation, fisher_values, shrunk, weighted_truncation

shapes = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)


def case(shape):
    return random(*shape), moments(shape[1]), moments(shape[0], seed=9)


def harm(D: Tensor, C: Tensor, G: Tensor) -> Tensor:
    """``tr(D C D^T G)`` with both shrunk as documented."""
    return torch.trace(D @ shrunk(C, 0.01) @ D.mT @ shrunk(G, 0.1))


def matrix(parts) -> Tensor:
    return parts.U * parts.S @ parts.Vh


def root(A: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    return Q * values.sqrt() @ Q.mT


@shapes
@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_closed_form_with_symmetric_roots(shape, rank):
    W, C, G = case(shape)
    parts = fisher_truncation(W, C, G, rank)
    R, L = root(shrunk(C, 0.01)), root(shrunk(G, 0.1))
    U, S, Vh = torch.linalg.svd(L @ W @ R, full_matrices=False)
    expected = torch.linalg.inv(L) @ (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(R)
    torch.testing.assert_close(matrix(parts), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(fisher_values(W, C, G), S, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(parts.error, S[rank:].norm() / S.norm(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(harm(W - expected, C, G), S[rank:].square().sum())
    torch.testing.assert_close(parts.U.mT @ parts.U, torch.eye(rank, dtype=W.dtype))
    torch.testing.assert_close(parts.Vh @ parts.Vh.mT, torch.eye(rank, dtype=W.dtype))


@shapes
def test_gradients_vanish_at_it_and_weighing_inputs_alone_is_worse(shape):
    W, C, G = case(shape)
    parts = fisher_truncation(W, C, G, 4)
    U, V = (parts.U * parts.S).requires_grad_(), parts.Vh.clone().requires_grad_()
    loss = harm(W - U @ V, C, G)
    for gradient in torch.autograd.grad(loss, (U, V)):
        assert gradient.abs().max() < 1e-8
    assert loss < harm(W - matrix(weighted_truncation(W, C, 4)), C, G)


@shapes
def test_rotating_inputs_or_outputs_rotates_the_result(shape):
    W, C, G = case(shape)
    Q, P = (torch.linalg.qr(random(n, n, seed=3)).Q for n in (shape[1], shape[0]))
    turned = fisher_truncation(P @ W @ Q.mT, Q @ C @ Q.mT, P @ G @ P.mT, 4)
    torch.testing.assert_close(matrix(turned), P @ matrix(fisher_truncation(W, C, G, 4)) @ Q.mT, rtol=1e-7, atol=1e-7)


@shapes
def test_outputs_alike_weigh_nothing_and_one_gradient_and_one_token_are_enough(shape):
    W, C, _ = case(shape)
    alike = fisher_truncation(W, C, 7.0 * torch.eye(shape[0], dtype=W.dtype), 4)
    torch.testing.assert_close(matrix(alike), matrix(weighted_truncation(W, C, 4)), rtol=1e-6, atol=1e-7)
    x, g = random(shape[1], 1), random(shape[0], 1, seed=2)
    single = matrix(fisher_truncation(W, x @ x.mT, g @ g.mT, 1))
    assert torch.linalg.matrix_rank(single) == 1
    competitor = matrix(weighted_truncation(W, x @ x.mT, 1))
    assert harm(W - single, x @ x.mT, g @ g.mT) <= harm(W - competitor, x @ x.mT, g @ g.mT) * (1 + 1e-9)


@shapes
def test_in_single_precision_and_of_no_moments_at_all(shape):
    W, C, G = case(shape)
    single = fisher_truncation(W.float(), C.float(), G.float(), 4)
    torch.testing.assert_close(matrix(single).double(), matrix(fisher_truncation(W, C, G, 4)), rtol=1e-3, atol=1e-4)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    nothing = fisher_truncation(W, torch.zeros_like(C), torch.zeros_like(G), 4)
    torch.testing.assert_close(matrix(nothing), U[:, :4] * S[:4] @ Vh[:4])
    assert fisher_truncation(torch.zeros_like(W), C, G, 4).error == 0


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.12 for a matrix of shape \(12, 20\), got 13"):
        fisher_truncation(*case((12, 20)), 13)
