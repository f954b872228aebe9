"""One step of the matrix optimizer: against torch.optim.Muon, and against the update written out."""

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from matrix_models import (
    FORMS,
    Q,
    adamw,
    assert_same,
    assert_same_tree,
    backward,
    bits,
    controller,
    ramp,
    step,
    trained,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_drt.forms import effective_weight, layer_of, trainable_weights
from hf_drt.optim.matrices import MOMENTUM

# The matrices of a dense weight, as views of it.
VIEWS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "llama": lambda W: [W],
    "gpt2": lambda W: [W.mT],
    "resnet": lambda W: [W.flatten(1)],
    "mixtral": lambda W: list(W) if W.ndim == 3 else [W],
}


class Muon:
    """torch.optim.Muon on the matrices of a model's target layers, AdamW on all other weights."""

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], kind: str, multiplier: Callable):
        self.views = VIEWS[kind]
        self.pairs = [(w, [nn.Parameter(v.detach().clone()) for v in self.views(w)]) for w in weights.values()]
        matrices = [matrix for _, matrices in self.pairs for matrix in matrices]
        targets = {id(w) for w in weights.values()}
        rest = [p for p in model.parameters() if id(p) not in targets]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=0.03, momentum=0.9, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1),
        )
        self.schedulers = [LambdaLR(optimizer, multiplier) for optimizer in self.optimizers]

    @torch.no_grad()
    def step(self) -> None:
        for weight, matrices in self.pairs:
            for gradient, matrix in zip(self.views(weight.grad), matrices, strict=True):
                matrix.grad = gradient.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        for weight, matrices in self.pairs:
            for view, matrix in zip(self.views(weight), matrices, strict=True):
                view.copy_(matrix)
        for scheduler in self.schedulers:
            scheduler.step()


@pytest.mark.parametrize("kind", VIEWS)
def test_dense_weights_move_as_under_torch_muon_and_all_others_as_under_adamw(kind):
    """Bit for bit, with weight decay and a schedule; kernels, transposed weights and experts by their matrices."""
    model = getattr(tiny, kind)()
    twin = copy.deepcopy(model)
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    drt.install(optimizer)
    scheduler = LambdaLR(optimizer, ramp)
    other = Muon(twin, {name: layer_of(twin, name).weight for name in drt.targets}, kind, ramp)
    data = kind if kind == "resnet" else "llama"
    before = copy.deepcopy(model.state_dict())
    for k in range(5):
        drt.begin_step(k, optimizer)
        step(model, optimizer, data)
        scheduler.step()
        backward(twin, data)
        other.step()
        twin.zero_grad()
        assert_same(model, twin)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad is None and p.any())


# ---- pairs of factors, against the update written out in float64


def written_out(M: Tensor) -> Tensor:
    Y = M / M.norm()
    for _ in range(5):
        gram = Y @ Y.mT
        Y = 3.4445 * Y + (-4.7750 * gram + 2.0315 * gram @ gram) @ Y
    return Y


def root_inverse(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.rsqrt() @ vectors.mT


def expected_pair(L: Tensor, R: Tensor, g_L: Tensor, g_R: Tensor, eta: float, keep: float) -> tuple[Tensor, Tensor]:
    root_L, root_R = root_inverse(L.mT @ L), root_inverse(R @ R.mT)
    dL = eta / 2 * written_out(g_L @ root_R) @ root_R
    dR = eta / 2 * root_L @ written_out(root_L @ g_R)
    return keep**0.5 * L - dL, keep**0.5 * R - dR


@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet"])
@pytest.mark.parametrize("schedule", ["factored@0 dense@9", "adapter@0 dense@9"], ids=["factored", "adapter"])
def test_a_step_of_factors_is_the_update_written_out(kind, schedule):
    """In float64, with gradients of W by autograd of a dense twin; out and in differ, and with them the rate."""
    model = getattr(tiny, kind)().double()
    drt = controller(model, schedule, adapter_init="principal", adapter_alpha=12.0)
    optimizer = adamw(model)
    data = kind if kind == "resnet" else "llama"
    inputs = {key: v.double() if v.is_floating_point() else v for key, v in tiny.batch(data).items()}
    drt.begin_step(0, optimizer)
    pairs = {name: [X.detach().clone() if isinstance(X, Tensor) else X for X in layer_of(model, name).pair()]
             for name in drt.targets}  # fmt: skip
    model(**inputs).loss.backward()
    gradients = {name: [X.grad.clone() for X in layer_of(model, name).pair()[:2]] for name in drt.targets}
    optimizer.step()
    for name, (out, into) in ((name, tuple(shape)[:2]) for name, shape in drt.targets.items()):
        L, R, s = pairs[name]
        # The first momentum is a tenth of the gradient, Nesterov's direction a multiple of it too.
        eta = 0.03 * max(1.0, out / into) ** 0.5 / s
        expected = expected_pair(L, R, *gradients[name], eta, 1 - 0.03 * 0.1)
        for found, value in zip(layer_of(model, name).pair()[:2], expected, strict=True):
            torch.testing.assert_close(found.detach(), value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", FORMS)
def test_momentum_is_nesterovs_average_of_each_weights_gradients(schedule):
    model = tiny.llama()
    drt = controller(model, schedule, adapter_init="principal")
    optimizer = adamw(model)
    weights = trainable_weights(layer_of(model, Q))
    expected = [torch.zeros_like(w) for w in weights]
    for k in range(3):
        drt.begin_step(k, optimizer)
        backward(model)
        expected = [0.9 * B + 0.1 * w.grad for B, w in zip(expected, weights, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    for weight, B in zip(weights, expected, strict=True):
        torch.testing.assert_close(optimizer.state[weight][MOMENTUM], B)


@pytest.mark.parametrize("schedule", FORMS)
def test_decay_shrinks_the_product_by_one_minus_rate_times_decay(schedule):
    """Without gradients but those that are zero; of an adapter its own product, not the frozen base."""
    model = tiny.llama().double()
    drt = controller(model, schedule, adapter_init="principal")
    optimizer = adamw(model, weight_decay=0.5)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    base = layer.base.detach().clone() if schedule.startswith("adapter") else 0.0
    before = effective_weight(layer).detach().clone() - base
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(
        effective_weight(layer).detach() - base, (1 - 0.03 * 0.5) * before, rtol=1e-12, atol=1e-14
    )


def test_decay_of_a_pair_with_a_frozen_factor_is_that_of_the_product_too():
    model = tiny.llama().double()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, weight_decay=0.5)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    layer.U.requires_grad_(False)
    U, before = layer.U.detach().clone(), effective_weight(layer).detach().clone()
    layer.V.grad = torch.zeros_like(layer.V)
    optimizer.step()
    assert torch.equal(layer.U, U)
    torch.testing.assert_close(effective_weight(layer).detach(), (1 - 0.03 * 0.5) * before, rtol=1e-12, atol=1e-14)


def test_decay_beyond_the_whole_weight_ends_at_zero_in_factors():
    model = tiny.llama().double()
    drt = controller(model, "factored@0 dense@9", matrix_lr=2.0)
    optimizer = adamw(model, weight_decay=0.6)
    drt.begin_step(0, optimizer)
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not effective_weight(layer_of(model, Q)).any()


# ---- low precision


def test_bfloat16_weights_take_the_step_of_their_float32_twin_rounded_once():
    steps = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny.llama().bfloat16().to(dtype)
        drt = controller(model, "factored@0 dense@9")
        twin = model
        optimizer = adamw(model)
        drt.begin_step(0, optimizer)
        if dtype == torch.float32:
            twin.load_state_dict({k: v.float() for k, v in steps["before"].items()})
            for p, g in zip(trained(model), steps["gradients"], strict=True):
                p.grad = g.float()
        else:
            steps["before"] = copy.deepcopy(model.state_dict())
            backward(model)
            steps["gradients"] = [p.grad.clone() for p in trained(model)]
        optimizer.step()
        steps[dtype] = [w.detach().clone() for name in drt.targets for w in trainable_weights(layer_of(model, name))]
        assert {s[MOMENTUM].dtype for s in optimizer.state.values() if MOMENTUM in s} == {dtype}
    for low, full in zip(steps[torch.bfloat16], steps[torch.float32], strict=True):
        assert torch.equal(low, full.bfloat16())


def test_bfloat16_dense_weights_take_the_step_of_their_float32_twin_rounded_once():
    model = tiny.llama().bfloat16()
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    backward(model)
    W = nn.Parameter(model.get_submodule(Q).weight.detach().float())
    W.grad = model.get_submodule(Q).weight.grad.float()
    torch.optim.Muon([W], lr=0.03, momentum=0.9, weight_decay=0.1).step()
    optimizer.step()
    assert torch.equal(model.get_submodule(Q).weight, W.bfloat16())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", FORMS)
def test_a_gradient_scaler_changes_no_bit_and_an_overflow_nothing(schedule, fused):
    """Fused, scale and overflow are left to the step."""
    runs = []
    for scaled in (False, True):
        model = tiny.llama()
        drt = controller(model, schedule, adapter_init="principal")
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100, enabled=scaled)
        for k in range(4):
            drt.begin_step(k, optimizer)
            if k == 2:
                if not scaled:
                    continue
                before = copy.deepcopy(bits(model, optimizer))
            scaler.scale(model(**tiny.batch()).loss).backward()
            if k == 2:
                trainable_weights(layer_of(model, Q))[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if k == 2:
                assert_same_tree(bits(model, optimizer), before)
        runs.append(model)
    assert_same(*runs)


def test_an_overflow_elsewhere_keeps_the_matrices_where_they_are_too():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    drt.begin_step(0, optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(**tiny.batch()).loss).backward()
    model.model.embed_tokens.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(MOMENTUM in state for state in optimizer.state.values())
