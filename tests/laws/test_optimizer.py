"""Laws of the optimizer across a change of form."""

import copy

import pytest
import tiny
import torch
from forms import OUT, PAIRS, dense, ids
from torch import nn
from transformers import Trainer

from hf_drt import DRTConfig, DynamicRank, Plan
from hf_drt.forms import Adapter, Dense, Factored, convert, prepare, trainable_weights
from hf_drt.optim import StepRules, carry_groups, carry_moments, frobenius_decay_, rewarmup_factor
from hf_drt.optim.groups import FROBENIUS, LR_SCALE
from hf_drt.optim.moments import MomentKeys, project
from hf_drt.optim.owners import FORM
from hf_drt.schedule import Phase
from hf_drt.targets.surgery import Swap, replace

ADAM = MomentKeys(("exp_avg",), ("exp_avg_sq",))
FROZEN = Dense(frozen=True)
# No run begins with frozen layers, of which no optimizer has a state: tests/test_rotation.py has what follows on them.
pairs = pytest.mark.parametrize(("before", "after"), [pair for pair in PAIRS if pair[0] != FROZEN], ids=ids)
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"]


def phase(form, start):
    return Phase(start, "frozen" if form == FROZEN else type(form).__name__.lower(), getattr(form, "rank", None))


def controller(model, before, after, **changes):
    adapter = next((f for f in (after, before) if isinstance(f, Adapter)), Adapter(4))
    config = DRTConfig(adapter_alpha=adapter.alpha, adapter_init=adapter.init, **changes)
    return DynamicRank(model, config, plan=Plan((phase(before, 0), phase(after, 3)), 6))


def step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fresh_optimizer(folder, model, drt, **arguments):
    """What Trainer would build over this model now."""
    trainer = Trainer(model=model, args=tiny.arguments(folder, **arguments))
    optimizer = trainer.create_optimizer()
    drt.install(optimizer)
    return optimizer


@pairs
@pytest.mark.parametrize("scaled", [None, "forms", "sides"])
def test_groups_equal_those_of_a_fresh_optimizer(tmp_path, before, after, scaled):
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    scales = {Factored: {"factored_lr_scale": 2.0, "frobenius_decay": True}, Adapter: {"adapter_lr_scale": 0.5}}
    used = [scales.get(type(form), {}) for form in (before, after)] if scaled else []
    if scaled == "sides" and not {before, after} <= {Dense(), FROZEN}:
        used += [{"left_lr_scale": 4.0}]
    drt = controller(model, before, after, **{name: value for some in used for name, value in some.items()})
    drt.apply(0)
    optimizer = fresh_optimizer(tmp_path, model, drt, weight_decay=0.1)
    step(model, optimizer)
    drt.apply(3, optimizer)
    trained = {p for p in model.parameters() if p.requires_grad}
    model.requires_grad_()  # frozen weights keep their places too
    expected = fresh_optimizer(tmp_path, model, drt, weight_decay=0.1)
    for p in model.parameters():
        p.requires_grad_(p in trained)
    if isinstance(after, Adapter):
        bases = {id(p) for name, p in model.named_parameters() if name.endswith(".base")}
        for group in expected.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in bases]
    assert len(optimizer.param_groups) == len(expected.param_groups)
    for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.sampled(60)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["project", "reset"])
@pairs
def test_every_supported_optimizer_trains_on_after_a_switch(tmp_path, name, policy, before, after):
    if before != Dense() and after != Dense() and name not in ("adamw_torch", "sgd"):
        return  # the remaining pairs are covered by two optimizers
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    drt = controller(model, before, after, moments=policy)
    drt.apply(0)
    trainer = Trainer(model=model, args=tiny.arguments(tmp_path, optim=name, learning_rate=1e-3))
    optimizer = trainer.create_optimizer()
    for k in range(6):
        if drt.match(k):
            drt.apply(k, optimizer)
        old = copy.deepcopy(model.state_dict())
        step(model, optimizer, k)
        moved = {n for n, p in model.state_dict().items() if p.numel() and not torch.equal(p, old[n])}
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and p.abs().sum() > 0}
        assert k == 0 or moved >= trainable - {n for n in trainable if "lora_A" in n}
    state = optimizer.state_dict()
    if after == FROZEN:  # an optimizer is made before a layer freezes, and keeps its place
        model.requires_grad_()
    other = Trainer(model=model, args=tiny.arguments(tmp_path, optim=name)).create_optimizer()
    other.load_state_dict(state)  # what a resume does
    step(model, other)


@pairs
def test_untouched_parameters_keep_their_state(before, after):
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    drt = controller(model, before, after)
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    step(model, optimizer)
    kept = model.model.embed_tokens.weight
    state = optimizer.state[kept]
    moments = {k: v.clone() for k, v in state.items()}
    drt.apply(3, optimizer)
    assert optimizer.state[kept] is state
    assert all(torch.equal(state[k], moments[k]) for k in moments)
    assert set(optimizer.state) <= {p for g in optimizer.param_groups for p in g["params"]}


# ---- moments, against independent calculations


def gradient_of_w(layer, G):
    """Gradients of the trainable weights for dL/dW = G, by autograd."""
    (layer.weight * (G.mT if layer.weight.shape[0] != OUT else G)).sum().backward()
    return [p.grad for p in trainable_weights(layer)]


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("after", [Factored(6), Adapter(6, 9.0, "principal")], ids=ids)
def test_first_moments_project_like_gradients(layout, after):
    old = dense(layout)
    new = convert(copy.deepcopy(old), after).module
    G = torch.randn(OUT, old.weight.numel() // OUT, generator=torch.Generator().manual_seed(0))
    stored = G.mT if layout == "conv1d" else G
    state = {"step": torch.tensor(5.0), "exp_avg": stored.clone(), "exp_avg_sq": stored.square()}
    images = project(old, new, [state], ADAM)
    for image, gradient in zip(images, gradient_of_w(new, G), strict=True):
        assert torch.allclose(image["exp_avg"], gradient, atol=1e-4)
        assert image["step"] == 5


def test_second_moments_project_to_the_variance_of_independent_entries():
    old, new = dense("linear"), convert(dense("linear"), Factored(6)).module
    sigma = torch.rand(old.weight.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    state = {"step": torch.tensor(1.0), "exp_avg": sigma * 1e-3, "exp_avg_sq": sigma.square()}
    images = project(old, new, [state], ADAM)
    samples = 4000
    noise = torch.randn(samples, *sigma.shape, generator=torch.Generator().manual_seed(1)) * sigma
    assert torch.allclose(images[0]["exp_avg_sq"], (noise @ new.V.mT).square().mean(0), rtol=0.2)
    assert torch.allclose(images[1]["exp_avg_sq"], (new.U.mT @ noise).square().mean(0), rtol=0.2)


@pytest.mark.parametrize("form", [Factored(4), Adapter(4, 12.0, "principal")], ids=ids)
def test_inflation_gives_the_least_norm_solution(form):
    """Against numpy's least-norm solver on the whole Kronecker system."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 6).double()
    old = convert(layer, form).module
    L, R, s = old.pair()
    M = torch.randn(6, 7, dtype=torch.float64)
    m_L, m_R = s * M @ R.detach().mT, s * L.detach().mT @ M
    by_weight = {id(L): m_L, id(R): m_R}
    states = [{"step": torch.tensor(3.0), "exp_avg": by_weight[id(w)], "exp_avg_sq": by_weight[id(w)] ** 2}
              for w in trainable_weights(old)]  # fmt: skip
    image = project(old, convert(copy.deepcopy(old), Dense()).module, states, ADAM)[0]["exp_avg"]
    eye_out, eye_in = torch.eye(6, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    system = torch.cat(
        [torch.kron(eye_out, s * R.detach().contiguous()), torch.kron((s * L.detach().mT).contiguous(), eye_in)]
    )
    right = torch.cat([m_L.flatten(), m_R.flatten()])
    expected = torch.linalg.pinv(system, rtol=1e-10) @ right
    assert torch.allclose(image.flatten(), expected, atol=1e-8)


def test_projected_moments_survive_inflation_and_deflation():
    """dense -> factored -> dense -> factored: the second projection finds what the first one gave."""
    W = dense("linear")
    F1 = convert(copy.deepcopy(W), Factored(6)).module
    G = torch.randn(W.weight.shape, generator=torch.Generator().manual_seed(0))
    first = project(W, F1, [{"step": torch.tensor(1.0), "exp_avg": G, "exp_avg_sq": G.square()}], ADAM)
    D = convert(copy.deepcopy(F1), Dense()).module
    F2 = prepare(D, Factored(6)).module
    second = project(D, F2, project(F1, D, first, ADAM), ADAM)
    signs = torch.sign((F1.U * F2.U).sum(0))
    assert torch.allclose(first[0]["exp_avg"], second[0]["exp_avg"] * signs, atol=1e-3)


def test_second_moments_are_never_below_the_squared_first():
    """A gradient that is the same at every step: its entries are anything but independent."""
    old, new = dense("linear"), convert(dense("linear"), Factored(6)).module
    G = torch.outer(torch.ones(OUT), torch.randn(old.weight.shape[1], generator=torch.Generator().manual_seed(0)))
    for image in project(old, new, [{"step": torch.tensor(50.0), "exp_avg": G, "exp_avg_sq": G.square()}], ADAM):
        assert (image["exp_avg_sq"] >= image["exp_avg"].square()).all()


def test_the_state_of_a_zero_adapter_starts_anew_for_lora_a():
    old, new = dense("linear"), convert(dense("linear"), Adapter(4)).module
    G = torch.ones_like(old.weight)
    state = {"step": torch.tensor(9.0), "exp_avg": G, "exp_avg_sq": G}
    lora_A, lora_B = project(old, new, [state], ADAM)
    assert lora_A == {}
    assert lora_B["step"] == 9


@pytest.mark.parametrize("policy", ["project", "reset"])
def test_the_optimizer_stays_as_it_was_until_the_commit_and_has_the_new_weights_after_it(policy):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    conversion = prepare(model[0], Factored(4))
    swaps = [Swap("0", model[0], conversion.module)]
    commit = carry_groups(optimizer, model, swaps)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    replace(model, swaps)
    commit()
    carry_moments(optimizer, swaps[0].old, swaps[0].new, policy)
    conversion.commit()
    assert set(optimizer.state) <= set(model.parameters())
    assert (model[0].U in optimizer.state) == (policy == "project")
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]


# ---- around the step


def test_frobenius_decay_is_the_gradient_of_half_the_squared_norm():
    U = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    V = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grad_U, grad_V = torch.autograd.grad((U @ V).square().sum() / 2, (U, V))
    new_U, new_V = U.detach().clone(), V.detach().clone()
    frobenius_decay_(new_U, new_V, 0.01)
    assert torch.allclose(new_U, U - 0.01 * grad_U)
    assert torch.allclose(new_V, V - 0.01 * grad_V)


def test_frobenius_decay_within_autocast_is_of_full_precision():
    torch.manual_seed(0)
    U, V = torch.randn(6, 3), torch.randn(3, 5)
    pairs = [(U.clone(), V.clone()) for _ in range(2)]
    frobenius_decay_(*pairs[0], 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frobenius_decay_(*pairs[1], 0.01)
    assert all(map(torch.equal, *pairs))


def test_frobenius_decay_takes_the_place_of_l2_on_the_factors():
    """One AdamW step by hand: decoupled decay of the product at the scheduled LR, no decay of U and V themselves."""
    model = tiny.llama()
    drt = DynamicRank(
        model, DRTConfig(schedule="factored@0", rank_multiple=4, frobenius_decay=True, factored_lr_scale=3.0), 10
    )
    drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    drt.begin_step(0, optimizer)
    group = next(g for g in optimizer.param_groups if g.get(FORM) == "factored")
    assert (group["weight_decay"], group[FROBENIUS], group[LR_SCALE]) == (0.0, 0.5, 3.0)
    layer = model.model.layers[0].mlp.up_proj
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    model(**tiny.batch()).loss.backward()
    lr = 0.03
    decayed = U - lr * 0.5 * U @ (V @ V.mT)
    expected = decayed - lr * layer.U.grad / (layer.U.grad.abs() + 1e-8)
    optimizer.step()
    assert torch.allclose(layer.U, expected, atol=1e-6)
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_the_rewarmup_is_linear_and_ends():
    factors = [rewarmup_factor(k, 4, 0.2) for k in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rewarmup_factor(None, 4, 0.2) == 1.0
    assert rewarmup_factor(0, 0, 0.2) == 1.0


def test_step_rules_scale_the_lr_within_the_step_only():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    StepRules(optimizer, lambda optimizer: [0.1])
    p.grad = torch.ones(1)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert p.item() == pytest.approx(-(0.1 + 0.05))
    assert optimizer.param_groups[0]["lr"] == 0.25
    StepRules.clear(optimizer)
    optimizer.step()
    assert p.item() == pytest.approx(-(0.15 + 0.25))


def test_the_rewarmup_follows_a_switch_but_not_the_start(tmp_path):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@4", rank_multiple=4, rewarmup_steps=2), 8)
    drt.apply(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    for k in range(8):
        drt.begin_step(k, optimizer)
        seen.append(drt.lr_factor())
    assert seen == pytest.approx([1, 1, 1, 1, 0.1, 0.55, 1, 1])
