"""Tucker-2 and CP against tensorly's at the same ranks."""

import pytest
import torch

from hf_drt.linalg.cp import cp, cp_limit, khatri_rao
from hf_drt.linalg.tucker import tucker2

tensorly = pytest.importorskip("tensorly")
SHAPES = [(16, 12, 3, 3), (12, 16, 3, 3), (24, 20, 1, 7), (10, 6, 5)]
TUCKER_TOLERANCE = 1e-4  # how much larger than tensorly's the relative error may be
CP_TOLERANCE = 0.02  # the same of a problem with many local minima, where either may find the better one


def kernel(shape):
    generator = torch.Generator().manual_seed(1)
    weights = torch.linspace(1, 0.1, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
    return torch.randn(shape, generator=generator) * weights


def relative(W, other):
    return ((other - W).norm() / W.norm()).item()


@pytest.fixture(autouse=True)
def _torch_backend():
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend("numpy")


@pytest.mark.parametrize("shape", SHAPES)
def test_tucker_is_as_good_as_tensorly(shape):
    from tensorly.decomposition import partial_tucker

    W = kernel(shape)
    ranks = shape[0] // 3, shape[1] // 2
    into, core, out, error = tucker2(W, *ranks)
    measured = relative(W, torch.einsum("ab...,oa,bi->oi...", core, out, into))
    assert error.item() == pytest.approx(measured, abs=1e-5)
    (other, factors), _ = partial_tucker(W.double(), rank=list(ranks), modes=[0, 1], init="svd")
    theirs = relative(W, tensorly.tenalg.multi_mode_dot(other, factors, modes=[0, 1]))
    assert measured <= theirs + TUCKER_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [4, 2])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cp_is_as_good_as_tensorly(shape, share):
    from tensorly.decomposition import parafac

    W, rank = kernel(shape), shape[0] // share
    *rest, out, error = cp(W, rank)
    measured = relative(W, (out @ khatri_rao(rest)).reshape(shape))
    assert error.item() == pytest.approx(measured, abs=1e-5)
    theirs = relative(
        W, tensorly.cp_to_tensor(parafac(W.double(), rank=rank, n_iter_max=100, init="svd", random_state=0))
    )
    assert measured <= theirs + CP_TOLERANCE


def test_tucker_finds_the_ranks_that_a_kernel_has():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) for size in ((4, 3, 3, 3), (16, 4), (3, 12))]
    W = torch.einsum("abhw,oa,bi->oihw", *parts)
    assert tucker2(W, 4, 3)[-1] < 1e-6
    assert tucker2(W, 3, 3)[-1] > 1e-3


def test_cp_finds_the_rank_that_a_kernel_has():
    generator = torch.Generator().manual_seed(3)
    out, *rest = (torch.randn(5, size, generator=generator) for size in (16, 12, 3, 3))
    W = (out.mT @ khatri_rao(rest)).reshape(16, 12, 3, 3)
    assert cp(W, 5)[-1] < 1e-4
    assert cp(W, 4)[-1] > 1e-3


def test_cp_is_the_same_every_time_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = cp(kernel((8, 6, 3, 3)), 4), cp(kernel((8, 6, 3, 3)), 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_vectors_of_a_component_have_the_same_norm():
    *factors, out, _ = cp(kernel((8, 6, 3, 3)), 4)
    norms = torch.stack([factor.norm(dim=1) for factor in (*factors, out.mT)])
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-5)
    assert cp_limit((8, 6, 3, 3)) == 54
