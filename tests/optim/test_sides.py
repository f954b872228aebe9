"""LR scales of the left factor (U, lora_B) and the right one (V, lora_A), against AdamW written out by hand."""

import copy

import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank

LR, DECAY, BETA1, BETA2, EPS = 1e-2, 0.1, 0.9, 0.99, 1e-6
PLAN, STEPS = "factored@0 dense@3 adapter@5 factored@8", 10
LEFT, RIGHT = ("U", "lora_B"), ("V", "lora_A")
RULES = {
    "left": {"left_lr_scale": 4.0},
    "right": {"right_lr_scale": 0.25},
    "both": {"left_lr_scale": 4.0, "right_lr_scale": 0.5},
    "equal": {"left_lr_scale": 3.0, "right_lr_scale": 3.0},
    # The right factors, and lora_B, are at the scheduled rate again.
    "beside scales of forms": {
        "left_lr_scale": 4.0, "right_lr_scale": 0.5, "factored_lr_scale": 2.0, "adapter_lr_scale": 0.25,
    },
    "frobenius decay": {"left_lr_scale": 4.0, "right_lr_scale": 0.5, "frobenius_decay": True},
    "frobenius decay, scale of the form": {"right_lr_scale": 0.5, "factored_lr_scale": 2.0, "frobenius_decay": True},
}  # fmt: skip
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
# Linear layers, layers stored transposed, kernels, and fused experts.
KINDS = {
    "llama": (tiny.llama, "llama"),
    "gpt2": (lambda: tiny.gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), "llama"),
    "resnet": (tiny.resnet, "resnet"),
    "mixtral": (lambda: tiny.mixtral(experts_implementation="eager"), "llama"),  # the others are not for float64
}


def controller(kind="llama", steps=STEPS, **settings):
    model = KINDS[kind][0]().double().train()
    drt = DynamicRank(model, DRTConfig(**{"schedule": PLAN, "rank": 4, **settings}), steps)
    drt.apply(0)
    return drt


def adamw(*models, together=True):
    own = [[p for p in model.parameters() if p.requires_grad] for model in models]
    groups = [{"params": [p for params in own for p in params]}] if together else [{"params": p} for p in own]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, betas=(BETA1, BETA2), eps=EPS)


def backward(drt, kind="llama"):
    inputs = tiny.batch(KINDS[kind][1])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    drt.model(**inputs).loss.backward()


def train(drts, optimizer, steps, scheduler=None, kind="llama"):
    for step in steps:
        for drt in drts:
            drt.begin_step(step, optimizer)
            backward(drt, kind)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def sides_of(optimizer):
    return [(g.get("drt_form"), g.get("drt_side"), g.get("drt_lr_scale")) for g in optimizer.param_groups]


def assert_equal(found, expected):
    """State dicts of two optimizers, bit for bit."""
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ---- the reference: no form groups, no step rules; rates by the parameters' names


def rate_scale(name, rule):
    leaf = name.rpartition(".")[2]
    form = {"U": "factored", "V": "factored", "lora_A": "adapter", "lora_B": "adapter"}.get(leaf)
    if form is None:
        return 1.0
    side = rule.get("left_lr_scale" if leaf in LEFT else "right_lr_scale", 1.0)
    return side * rule.get(f"{form}_lr_scale", 1.0)


@torch.no_grad()
def step_by_hand(model, optimizer, lr, rule):
    """AdamW on every parameter; the optimizer holds the moments, so that a switch carries them, and nothing else."""
    rates = {id(p): lr * rate_scale(name, rule) for name, p in model.named_parameters()}
    product_decay = rule.get("frobenius_decay", False)
    if product_decay:
        for module in model.modules():
            if "U" in module._parameters:
                U, V = module.U.clone(), module.V.clone()
                with torch.enable_grad():
                    leaves = [t.requires_grad_() for t in (U.clone(), V.clone())]
                    norms = (leaves[0] @ leaves[1]).square().sum() / 2
                for factor, gradient in zip((module.U, module.V), torch.autograd.grad(norms, leaves), strict=True):
                    factor -= rates[id(factor)] * DECAY * gradient
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        if not (product_decay and name.rpartition(".")[2] in ("U", "V")):
            p -= rates[id(p)] * DECAY * p
        state = optimizer.state[p]
        if "step" not in state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] = state["step"] + 1
        count = state["step"].item()
        state["exp_avg"] = BETA1 * state["exp_avg"] + (1 - BETA1) * p.grad
        state["exp_avg_sq"] = BETA2 * state["exp_avg_sq"] + (1 - BETA2) * p.grad**2
        corrected = state["exp_avg_sq"] / (1 - BETA2**count)
        p -= rates[id(p)] * state["exp_avg"] / (1 - BETA1**count) / (corrected.sqrt() + EPS)


def trained_by_hand(kind, rule, moments):
    drt = controller(kind, moments=moments)
    optimizer = adamw(drt.model)
    for step in range(STEPS):
        drt.begin_step(step, optimizer)
        backward(drt, kind)
        step_by_hand(drt.model, optimizer, LR * 0.9**step, rule)
        optimizer.zero_grad()
    assert len(optimizer.param_groups) == 1
    return drt


def trained(kind, rule, moments):
    drt = controller(kind, moments=moments, **rule)
    optimizer = adamw(drt.model)
    drt.install(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    groups = len(optimizer.param_groups)
    train([drt], optimizer, range(STEPS), scheduler, kind)
    assert len(optimizer.param_groups) == groups
    return drt


def assert_close(drt, expected):
    found = drt.model.state_dict()
    assert found.keys() == expected.model.state_dict().keys()
    for name, tensor in expected.model.state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=1e-7, atol=1e-9), name


@pytest.mark.sampled(5)
@rules
@pytest.mark.parametrize("moments", ["reset", "project"])
def test_each_side_is_trained_at_its_own_rate(rule, moments):
    assert_close(trained("llama", rule, moments), trained_by_hand("llama", rule, moments))


@pytest.mark.parametrize("rule", ["both", "frobenius decay, scale of the form"])
@pytest.mark.parametrize("kind", ["gpt2", "resnet", "mixtral"])
def test_layers_of_every_kind_have_the_sides_of_their_product(kind, rule):
    assert_close(trained(kind, RULES[rule], "project"), trained_by_hand(kind, RULES[rule], "project"))


def test_the_reference_sees_the_side():
    """It would miss nothing: with the sides exchanged it ends elsewhere."""
    exchanged = {"left_lr_scale": 0.5, "right_lr_scale": 4.0}
    with pytest.raises(AssertionError):
        assert_close(trained("llama", RULES["both"], "reset"), trained_by_hand("llama", exchanged, "reset"))


# ---- groups


@rules
@pytest.mark.parametrize("everything", [False, True], ids=["trainable ones", "all parameters"])
def test_every_weight_is_in_the_group_of_its_side_in_model_order(rule, everything):
    drt = controller("mixtral", schedule="adapter@0 dense@2 factored@4 adapter@6", steps=8, **rule)
    optimizer = torch.optim.AdamW(p for p in drt.model.parameters() if everything or p.requires_grad)
    for step in range(8):
        drt.begin_step(step, optimizer)
        backward(drt, "mixtral")
        names = {id(p): name for name, p in drt.model.named_parameters()}
        found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for group, inside in zip(optimizer.param_groups, found, strict=True):
            assert inside == [name for name in names.values() if name in inside]
            for name in inside:
                is_base = name.endswith(".base")
                assert group.get("drt_lr_scale", 1.0) == (1.0 if is_base else rate_scale(name, rule)), name
        inside = [name for group in found for name in group]
        assert len(inside) == len(set(inside))
        assert set(inside) >= {name for name, p in drt.model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()


def test_sides_with_scales_of_their_own_have_groups_of_their_own():
    drt = controller(**RULES["both"])
    optimizer = adamw(drt.model)
    drt.install(optimizer)
    assert sorted(sides_of(optimizer)[1:]) == [
        ("adapter", "left", 4.0), ("adapter", "right", 0.5), ("factored", "left", 4.0), ("factored", "right", 0.5),
    ]  # fmt: skip
    drt.begin_step(3, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups[1:]] == [0, 0, 0, 0]


def test_a_side_at_the_scheduled_rate_stays_where_it_was():
    drt = controller(**RULES["left"])
    optimizer = adamw(drt.model)
    drt.install(optimizer)
    assert sides_of(optimizer) == [(None, None, None), ("factored", "left", 4.0), ("adapter", "left", 4.0)]


def test_a_side_that_stays_has_the_place_of_the_dense_weight_in_a_group_of_any_order():
    drt = controller(schedule="dense@0 factored@1 dense@2", steps=3, **RULES["left"])
    optimizer = torch.optim.AdamW(reversed(list(drt.model.parameters())))
    found = []
    for step in range(3):
        drt.begin_step(step, optimizer)
        names = {id(p): name for name, p in drt.model.named_parameters()}
        found.append([names[id(p)] for p in optimizer.param_groups[0]["params"]])
    weights = {f"{name}.weight": f"{name}.V" for name in drt.targets}
    assert found == [found[0], [weights.get(name, name) for name in found[0]], found[0]]


@pytest.mark.parametrize("form", [{"factored_lr_scale": 2.0, "frobenius_decay": True}, {"adapter_lr_scale": 0.5}, {}])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_groups_of_equal_sides_are_those_of_the_forms(form, scale):
    """No entry beside those that groups have always had: checkpoints of both sorts are each other's."""
    drt = controller(left_lr_scale=scale, right_lr_scale=scale, **form)
    optimizer = adamw(drt.model)
    drt.install(optimizer)
    scales = {name: form.get(name, 1.0) * scale for name in ("factored_lr_scale", "adapter_lr_scale")}
    other = controller(**form | scales)
    expected = adamw(other.model)
    other.install(expected)
    assert optimizer.state_dict() == expected.state_dict()
    assert all("drt_side" not in group for group in optimizer.param_groups)


# ---- several controllers, copies, checkpoints


def two(together, optimizer_each=False):
    drts = [controller("llama", **RULES["both"]), controller("gpt2", **RULES["frobenius decay, scale of the form"])]
    if optimizer_each:
        return drts, [adamw(drt.model) for drt in drts]
    return drts, adamw(*(drt.model for drt in drts), together=together)


@pytest.mark.parametrize("together", [False, True], ids=["groups", "one group"])
def test_two_controllers_on_one_optimizer_do_what_each_does_on_its_own(together):
    alone, optimizers = two(together, optimizer_each=True)
    for drt, optimizer in zip(alone, optimizers, strict=True):
        train([drt], optimizer, range(STEPS))
    drts, optimizer = two(together)
    train(drts, optimizer, range(STEPS))
    for drt, expected in zip(drts, alone, strict=True):
        assert all(torch.equal(drt.model.state_dict()[name], t) for name, t in expected.model.state_dict().items())


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 9])
def test_a_loop_with_two_controllers_is_resumed_bitwise(at):
    def started(states=None):
        drts, optimizer = two(together=True)
        for index, drt in enumerate(drts):
            drt.install(optimizer)
            if states is not None:
                drt.load_state_dict(states[index], optimizer)
        return drts, optimizer

    straight, optimizer = started()
    train(straight, optimizer, range(STEPS))
    first, before = started()
    train(first, before, range(at))
    stored = copy.deepcopy([([drt.state_dict() for drt in first]), [tensors(drt.model) for drt in first]])
    options = copy.deepcopy(before.state_dict())
    del first, before
    drts, again = started(stored[0])
    for drt, weights in zip(drts, stored[1], strict=True):
        drt.model.load_state_dict(weights)
    again.load_state_dict(options)
    train(drts, again, range(at, STEPS))
    for drt, expected in zip(drts, straight, strict=True):
        assert all(torch.equal(drt.model.state_dict()[name], t) for name, t in expected.model.state_dict().items())
    assert_equal(again.state_dict(), optimizer.state_dict())


def test_a_copy_of_controller_model_and_optimizer_goes_on_to_the_same_bits():
    drt = controller(**RULES["frobenius decay"])
    optimizer = adamw(drt.model)
    train([drt], optimizer, range(6))
    twin, its_optimizer = copy.deepcopy((drt, optimizer))
    for one, its in ((drt, optimizer), (twin, its_optimizer)):
        train([one], its, range(6, STEPS))
    assert sides_of(optimizer) == sides_of(its_optimizer)
    assert all(torch.equal(twin.model.state_dict()[name], t) for name, t in drt.model.state_dict().items())


def test_layers_that_are_dense_again_have_left_their_sides():
    drt = controller(**RULES["beside scales of forms"])
    optimizer = adamw(drt.model)
    train([drt], optimizer, range(2))
    drt.to_dense(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups[1:]] == [0] * (len(optimizer.param_groups) - 1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in drt.model.parameters()]


# ---- refusals


def test_sides_cannot_change_on_one_optimizer():
    drt = controller(**RULES["both"])
    optimizer = adamw(drt.model)
    drt.begin_step(0, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    for change in (
        {"left_lr_scale": 0.5, "right_lr_scale": 4.0},
        {"left_lr_scale": 4.0},
        {"frobenius_decay": True},
        {},
    ):
        other = DynamicRank(drt.model, DRTConfig(schedule=PLAN, rank=4, **change), STEPS)
        with pytest.raises(ValueError, match=r"an earlier DynamicRank .* or other values of .*left_lr_scale, right_lr"):
            other.begin_step(0, optimizer)
        assert optimizer.state_dict() == before


def test_factors_in_different_groups_of_the_users_are_pointed_to_the_settings():
    drt = controller(**RULES["both"])
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in drt.model.named_parameters():
        parts[name.endswith(".U")].append(parameter)
    optimizer = torch.optim.AdamW([{"params": parts[True], "lr": 4 * LR}, {"params": parts[False]}])
    with pytest.raises(ValueError, match=r"are in different parameter groups .* left_lr_scale or right_lr_scale\."):
        drt.begin_step(0, optimizer)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["left_lr_scale", "right_lr_scale"])
def test_the_matrix_optimizer_moves_both_sides_by_one_rate(name):
    config = DRTConfig(schedule="factored@0 dense@2", rank=4, matrix_optimizer="muon", **{name: 2.0})
    message = (
        rf"{name} is 2\.0, and would have no effect: matrix_optimizer=muon moves both factors by one rate, .* Give"
    )
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.llama(), config, 4)


@pytest.mark.parametrize("decomposition", ["tucker", "cp"])
@pytest.mark.parametrize(("name", "side"), [("left_lr_scale", "left"), ("right_lr_scale", "right")])
def test_products_of_other_tensors_have_no_sides(decomposition, name, side):
    config = DRTConfig(schedule="factored@0 dense@2", rank=4, decomposition=decomposition, **{name: 2.0})
    message = rf"{name} is of the {side} factor of a product U V, and decomposition='{decomposition}' is of other tens"
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.resnet(), config, 4)


@pytest.mark.parametrize("name", ["left_lr_scale", "right_lr_scale"])
def test_a_state_of_other_sides_is_refused(name):
    state = controller().state_dict()
    assert name not in state["settings"]
    drt = controller(**{name: 2.0})
    with pytest.raises(ValueError, match=rf"{name} is 2\.0 here, and 1\.0 in the state\. Resume with the model and"):
        drt.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"{name} is 1\.0 here, and 2\.0 in the state\. Resume with the model and"):
        controller().load_state_dict(drt.state_dict())
