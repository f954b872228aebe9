"""Optimizer state through a split of adapters, against autograd and independent sums in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_drt.forms import Adapter, ExpertStack, convert, effective_weight, layout_of, trainable_weights
from hf_drt.optim import MomentKeys, carry_moments
from hf_drt.optim.moments import project

ADAM = MomentKeys(("exp_avg",), ("exp_avg_sq",))
LAYERS = {
    "linear": lambda: nn.Linear(14, 9),
    "conv1d of GPT-2": lambda: Conv1D(9, 14),
    "Conv2d": lambda: nn.Conv2d(3, 9, 3),
    "experts": lambda: ExpertStack(nn.Parameter(torch.randn(2, 9, 14)), False),
}
layers = pytest.mark.parametrize("name", LAYERS)


def adapter(name: str, rank: int, alpha: float = 3.0, moved: float = 0.2):
    torch.manual_seed(0)
    layer = convert(LAYERS[name]().double(), Adapter(rank, alpha, "split")).module
    with torch.no_grad():
        for weight in trainable_weights(layer):
            weight.add_(torch.randn_like(weight), alpha=moved)
    return layer


def after(layer, rank: int, alpha: float = 5.0):
    return convert(copy.deepcopy(layer), Adapter(rank, alpha, "split")).module


def gradients(layer, G: Tensor) -> list[Tensor]:
    """Of the trainable weights for dL/dW = G, by autograd through ``base + s L R``."""
    L, R, s = layer.pair()
    return list(torch.autograd.grad((s * (L @ R) * G).sum(), trainable_weights(layer)))


def averages(layer, Gs: Tensor) -> list[dict[str, Tensor]]:
    """Adam's moments after these gradients of W, both of one beta, so that no square is above its average."""
    states = [{"step": torch.tensor(float(len(Gs)))} for _ in trainable_weights(layer)]
    for G in Gs:
        for state, g in zip(states, gradients(layer, G), strict=True):
            state["exp_avg"] = 0.9 * state.get("exp_avg", torch.zeros_like(g)) + 0.1 * g
            state["exp_avg_sq"] = 0.9 * state.get("exp_avg_sq", torch.zeros_like(g)) + 0.1 * g.square()
    return states


def noise(layer, count: int, seed: int = 3) -> Tensor:
    shape = effective_weight(layer).shape
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@layers
@pytest.mark.parametrize("rank", [5, 3, 1])
def test_first_moments_are_what_the_kept_factors_would_have_gathered(name, rank):
    old = adapter(name, 5)
    new, Gs = after(old, rank), noise(old, 6)
    for image, expected in zip(project(old, new, averages(old, Gs), ADAM), averages(new, Gs), strict=True):
        torch.testing.assert_close(image["exp_avg"], expected["exp_avg"], rtol=1e-9, atol=1e-11)
        assert image["step"] == 6
        assert (image["exp_avg_sq"] >= image["exp_avg"].square()).all()


@layers
def test_directions_that_stay_as_they_are_keep_both_moments(name):
    """Of balanced principal factors a smaller rank keeps the first ones, so that nothing has to be mixed."""
    old = adapter(name, 5, alpha=5.0, moved=0.0)
    new = after(old, 3, alpha=3.0)
    states = averages(old, noise(old, 4))
    images = project(old, new, states, ADAM)
    for state, image, weight, kept, axis in zip(
        states, images, (new.lora_A, new.lora_B), (old.lora_A, old.lora_B), (-2, -1), strict=True
    ):
        signs = torch.sign((weight * kept.narrow(axis, 0, 3)).sum(-3 - axis, keepdim=True))
        for key, sign in (("exp_avg", signs), ("exp_avg_sq", 1)):
            torch.testing.assert_close(image[key], sign * state[key].narrow(axis, 0, 3), rtol=1e-7, atol=1e-12)


@layers
@pytest.mark.parametrize(("moved", "close"), [(0.0, 1e-8), (0.01, 0.2)])
@pytest.mark.parametrize("rank", [3, 8])
def test_second_moments_are_the_variances_of_independent_gradients(name, rank, moved, close):
    """Of a G whose entries are independent, of variance rho_i in row i: of dL = s G R^T it is ``s^2 rho_i ||R_k||^2``,
    of dR = s L^T G ``s^2 sum_i L_ik^2 rho_i``. The second is told for new directions where all rho are one."""
    old = adapter(name, 5, moved=moved)
    new = after(old, rank)

    def variances(layer, rho: Tensor) -> list[Tensor]:
        (L, R, s), columns = layer.pair(), effective_weight(layer).shape[-1]
        v_R = s**2 * (L.square() * rho[:, None]).sum(-2)[..., None].expand(*R.shape[:-1], columns)
        return [v_R, s**2 * rho[:, None] * R.square().sum(-1)[..., None, :]]

    for rho in (torch.ones(9, dtype=torch.float64), torch.linspace(0.1, 3, 9, dtype=torch.float64)):
        states = [{"exp_avg": torch.full_like(v, 1e-9), "exp_avg_sq": v.detach()} for v in variances(old, rho)]
        images = project(old, new, states, ADAM)
        exact = [bool(rho.eq(1).all()) or (rank <= 5 and not moved), True]
        for image, expected, told in zip(images, variances(new, rho), exact, strict=True):
            if told:
                torch.testing.assert_close(image["exp_avg_sq"], expected, rtol=close, atol=0)


@layers
def test_new_directions_know_of_old_gradients_what_lies_in_the_old_span(name):
    old = adapter(name, 4)
    new, Gs = after(old, 7), noise(old, 5)
    (L, R, _), (new_L, new_R, s) = old.pair(), new.pair()
    M = sum(0.1 * 0.9 ** (len(Gs) - 1 - t) * G for t, G in enumerate(Gs))
    P, Q = L @ torch.linalg.pinv(L), torch.linalg.pinv(R) @ R  # onto the columns of L, the rows of R
    expected = {id(new_L): s * M @ (new_R @ Q).mT, id(new_R): s * (P @ new_L).mT @ M}
    for weight, image in zip(trainable_weights(new), project(old, new, averages(old, Gs), ADAM), strict=True):
        torch.testing.assert_close(image["exp_avg"], expected[id(weight)], rtol=1e-8, atol=1e-11)
        assert (image["exp_avg_sq"] > 0).all()


def test_the_first_update_after_growth_is_no_larger_than_those_before():
    """With a second moment of zero beside a high step count, Adam's would be 3 times as large, or more."""
    torch.manual_seed(0)
    layer = convert(nn.Linear(40, 24), Adapter(6, 6.0, "split")).module
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(64, 40)

    def step(layer):
        before = [w.detach().clone() for w in trainable_weights(layer)]
        optimizer.zero_grad()
        (layer(x + 0.1 * torch.randn_like(x)) - x[:, :24]).square().mean().backward()
        optimizer.step()
        return max((w - b).abs().max().item() for w, b in zip(trainable_weights(layer), before, strict=True))

    for _ in range(50):
        step(layer)
    new = convert(copy.deepcopy(layer), Adapter(12, 12.0, "split")).module
    carry_moments(optimizer, layer, new, "project")
    optimizer.param_groups[0]["params"] = [p for p in new.parameters() if p.requires_grad]
    assert all(optimizer.state[w]["step"] == 50 for w in trainable_weights(new))
    assert step(new) <= 1.5e-3


def test_no_matrix_of_the_weights_size_is_formed(monkeypatch):
    old = adapter("linear", 5)
    states, new = averages(old, noise(old, 2)), after(old, 3)
    monkeypatch.setattr("hf_drt.optim.moments._lift", lambda *args: pytest.fail("by way of W"))
    assert all(project(old, new, states, ADAM))
    assert layout_of(new) == layout_of(old)
