"""Optimizers whose step looks at more than a weight and its state: what new weights meet there."""

import math

import pytest
import tiny
import torch
from optimi import StableAdamW
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchao.optim import AdamW8bit

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import trainable_weights
from hf_drt.optim.groups import LR_SCALE

LAYER = "model.layers.0.mlp.up_proj"


def train(model, optimizer, seed=0, kind="llama"):
    torch.manual_seed(seed)
    model(**tiny.batch(kind)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def controller(model=None, **settings):
    settings = {"schedule": "dense@0 factored@50%", "rank": 8, **settings}
    drt = DynamicRank(model if model is not None else tiny.llama(), DRTConfig(**settings), max_steps=200)
    drt.apply(0)
    return drt


# ---- StableAdamW counts the steps of a group


def ramp(optimizer, drt, weight, steps):
    """Sizes of a weight's updates, as shares of the rate, where all gradients are one at every step."""
    found = []
    for _ in range(steps):
        for p in drt.model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        before = weight.detach().clone()
        optimizer.step()
        found.append(((before - weight) / optimizer.param_groups[0]["lr"]).mean().item())
    return found


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_moments_that_begin_anew_late_ramp_up_with_beta1(scale):
    """A gradient of ones at every step: m = 1 - beta1^t and v = 1 - beta2^t, and the rate is divided by the root mean
    square of g / sqrt(v), which is 1 / sqrt(v)."""
    drt = controller(moments="reset", factored_lr_scale=scale)
    optimizer = StableAdamW(drt.model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    drt.install(optimizer)
    ramp(optimizer, drt, drt.model.get_submodule(LAYER).weight, 100)
    drt.begin_step(100, optimizer)
    weight = drt.model.get_submodule(LAYER).U
    found = ramp(optimizer, drt, weight, 8)
    assert found == pytest.approx([scale * (1 - 0.9**t) for t in range(1, 9)], rel=0.05)
    counts = {int(group["step"]) for group in optimizer.param_groups}
    assert counts == {108}  # a group that was empty until now has counted too


def test_moments_that_follow_make_no_ramp():
    """Projected, both moments are those of a hundred steps, which is what the group's count says."""
    drt = controller(moments="project")
    optimizer = StableAdamW(drt.model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    drt.install(optimizer)
    layer = drt.model.get_submodule(LAYER)
    ramp(optimizer, drt, layer.weight, 100)
    M = optimizer.state[layer.weight]["exp_avg"].clone()
    drt.begin_step(100, optimizer)
    layer = drt.model.get_submodule(LAYER)
    (layer.weight * M).sum().backward()
    for weight in trainable_weights(layer):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad)
    train(drt.model, optimizer)


@pytest.mark.parametrize("moments", ["project", "reset"])
def test_rounding_errors_of_half_precision_begin_anew_in_the_shape_of_the_new_weights(moments):
    drt = controller(tiny.llama().bfloat16(), moments=moments)
    optimizer = StableAdamW(drt.model.parameters(), lr=1e-3)
    drt.install(optimizer)
    for seed in range(3):
        train(drt.model, optimizer, seed)
    drt.begin_step(100, optimizer)
    for weight in trainable_weights(drt.model.get_submodule(LAYER)):
        state = optimizer.state[weight]
        assert state["kahan_comp"].shape == state["exp_avg"].shape == weight.shape
        assert not state["kahan_comp"].any()
        assert bool(state["exp_avg"].any()) == (moments == "project")
    train(drt.model, optimizer)
    assert all(p.isfinite().all() for p in drt.model.parameters())


def test_steps_inside_the_backward_pass_are_refused():
    drt = controller()
    optimizer = StableAdamW(drt.model.parameters(), lr=1e-3, gradient_release=True)
    message = (
        r"StableAdamW cannot follow a change of form: with gradient_release=True hooks .* Use gradient_release=Fal"
    )
    with pytest.raises(ValueError, match=message):
        drt.install(optimizer)


# ---- options of groups that are tensors


def test_each_group_has_its_own_rate_where_rates_are_tensors():
    """A scheduler that changes them in place, one group after the other."""
    drt = controller(schedule="factored@0 dense@50%", factored_lr_scale=2.0)
    optimizer = AdamW8bit(drt.model.parameters(), lr=0.5)
    drt.install(optimizer)
    assert [group.get(LR_SCALE) for group in optimizer.param_groups] == [None, 2.0]
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25]


def test_groups_added_late_count_their_own_steps():
    drt = controller(schedule="factored@0 dense@50%", factored_lr_scale=2.0)
    optimizer = StableAdamW(drt.model.parameters(), lr=1e-3)
    train(drt.model, optimizer)
    drt.install(optimizer)
    train(drt.model, optimizer, 1)
    assert [int(group["step"]) for group in optimizer.param_groups] == [2, 2]


# ---- Muon takes matrices


def test_muon_is_refused_for_kernels_before_it_would_fail_at_them():
    """The factors of a kernel are matrices, so that it could begin."""
    drt = controller(tiny.resnet(), schedule="factored@0 dense@50%", rank=4)
    layers = [drt.model.get_submodule(name) for name in drt.targets]
    optimizer = torch.optim.Muon([weight for layer in layers for weight in trainable_weights(layer)])
    message = r"Muon takes matrices alone, but the dense weight of \S+convolution has shape \(16, 8, 3, 3\)\. Leave the"
    with pytest.raises(ValueError, match=message):
        drt.install(optimizer)


def test_muon_never_meets_kernels_that_the_matrix_optimizer_trains():
    """Nor does it matter which optimizer it is then: all weights that it has are trained beside it."""
    trained = []
    for kind in (torch.optim.Muon, torch.optim.SGD):
        settings = {"matrix_optimizer": "muon", "moments": "project"}
        drt = controller(tiny.resnet(), schedule="factored@0 dense@50%", rank=4, **settings)
        layers = [drt.model.get_submodule(name) for name in drt.targets]
        optimizer = kind([w for layer in layers for w in trainable_weights(layer)], lr=1e-3, weight_decay=0.1)
        drt.install(optimizer)
        for step in (0, 99, 100, 101):
            drt.begin_step(step, optimizer)
            train(drt.model, optimizer, step, kind="resnet")
            drt.model.zero_grad()
        trained.append(drt.model.state_dict())
    kernels = [drt.model.get_submodule(name).weight for name in drt.targets]
    assert all(kernel.ndim == 4 for kernel in kernels)
    assert {id(kernel) for kernel in kernels} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    for found, expected in zip(trained[0].values(), trained[1].values(), strict=True):
        assert torch.equal(found, expected)


def test_muons_momentum_follows_by_the_chain_rule():
    drt = controller(moments="project")
    matrices = [p for layer in drt.model.model.layers for p in layer.parameters() if p.ndim == 2]
    optimizer = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    drt.install(optimizer)
    for seed in range(3):
        train(drt.model, optimizer, seed)
        drt.model.zero_grad()
    M = optimizer.state[drt.model.get_submodule(LAYER).weight]["momentum_buffer"].clone()
    drt.begin_step(100, optimizer)
    layer = drt.model.get_submodule(LAYER)
    (layer.weight * M).sum().backward()
    for weight in trainable_weights(layer):
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], weight.grad)


def test_the_rates_of_u_and_v_are_one_where_muon_matches_adamw():
    """Each has singular values near one, and their shapes decide the rate: by default U, which is tall, has more."""
    shapes = {}
    for adjust in (None, "match_rms_adamw"):
        U, V = nn.Parameter(torch.zeros(256, 16)), nn.Parameter(torch.zeros(16, 256))
        U.grad, V.grad = torch.randn(256, 16), torch.randn(16, 256)
        torch.optim.Muon([U, V], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust).step()
        shapes[adjust] = U.detach().norm() / V.detach().norm()
    assert shapes[None] == pytest.approx(math.sqrt(256 / 16), rel=0.2)
    assert shapes["match_rms_adamw"] == pytest.approx(1.0, rel=0.2)


def test_adagrads_sums_of_squares_follow_as_second_moments_do():
    drt = controller(moments="project")
    optimizer = torch.optim.Adagrad(drt.model.parameters(), lr=1e-2)
    drt.install(optimizer)
    for seed in range(3):
        train(drt.model, optimizer, seed)
    S = optimizer.state[drt.model.get_submodule(LAYER).weight]["sum"].clone()
    drt.begin_step(100, optimizer)
    layer = drt.model.get_submodule(LAYER)
    torch.testing.assert_close(optimizer.state[layer.U]["sum"], S @ layer.V.detach().square().mT)
    torch.testing.assert_close(optimizer.state[layer.V]["sum"], layer.U.detach().square().mT @ S)
    train(drt.model, optimizer)
