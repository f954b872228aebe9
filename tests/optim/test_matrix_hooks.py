"""Around a step of the matrix optimizer: gradients, closures, failures, and what has no part in it."""

import copy
import gc

import pytest
import tiny
import torch
import transformers as T
from matrix_models import FORMS, Q, adamw, assert_same, backward, controller, loop, step, trained
from torch import nn

from hf_drt import DRTCallback, DRTConfig
from hf_drt.forms import effective_weight, layer_of, trainable_weights
from hf_drt.optim import OPTIMIZERS, MomentKeys, OptimizerRule
from hf_drt.optim.matrices import MOMENTUM

CLOSURE = r"takes the gradients before optimizer\.step\(\), and step\(closure\) computes them .* then step\(\) without"


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["position", "keyword"])
def test_a_closure_is_refused_whether_gradients_are_there_or_not(call, gradients):
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    if gradients:
        backward(model)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        backward(model)

    with pytest.raises(ValueError, match=CLOSURE):
        call(optimizer, closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all((p.grad is not None) == gradients for p in trained(model))
    closure()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("schedule", FORMS)
def test_a_step_within_autocast_is_that_without(schedule):
    runs = []
    for enabled in (False, True):
        model = tiny.llama()
        drt = controller(model, schedule, adapter_init="principal")
        optimizer = adamw(model)
        drt.begin_step(0, optimizer)
        backward(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        runs.append(model)
    assert_same(*runs)


@pytest.mark.parametrize("schedule", FORMS)
def test_an_optimizer_that_maximizes_does_so_with_the_matrices_too(schedule):
    runs = []
    for maximize in (False, True):
        model = tiny.llama()
        drt = controller(model, schedule, adapter_init="principal")
        optimizer = adamw(model, maximize=maximize)
        for k in range(2):
            drt.begin_step(k, optimizer)
            backward(model)
            for p in trained(model) if maximize else ():
                p.grad.neg_()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert_same(*runs)


def test_gradients_are_the_callers_again_after_a_step():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    backward(model)
    gradients = {p: (p.grad, p.grad.clone()) for p in trained(model)}
    optimizer.step()
    for p, (gradient, value) in gradients.items():
        assert p.grad is gradient
        assert torch.equal(p.grad, value)


def test_a_step_that_raises_leaves_nothing_for_the_next():
    """What it had taken aside is never applied later."""
    runs = []
    for fails in (False, True):
        model = tiny.llama()
        drt = controller(model, "factored@0 dense@9")
        optimizer = adamw(model)
        drt.begin_step(0, optimizer)
        if fails:

            def failing(*_):
                raise RuntimeError("on purpose")

            handle = optimizer.register_step_pre_hook(failing)
            backward(model)
            with pytest.raises(RuntimeError, match="on purpose"):
                optimizer.step()
            handle.remove()
            optimizer.zero_grad()
            optimizer.step()  # without gradients: nothing moves
        step(model, optimizer)
        runs.append(model)
    assert_same(*runs)


def fail(*_):
    raise RuntimeError("on purpose")


def failed_step(model, optimizer) -> None:
    handle = optimizer.register_step_pre_hook(fail)  # behind the one that takes the gradients aside
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.step()
    handle.remove()
    assert layer_of(model, Q).U.grad is None


def begun(schedule="factored@0 dense@9", make=adamw):
    model = tiny.llama()
    drt = controller(model, schedule)
    optimizer = make(model)
    drt.begin_step(0, optimizer)
    step(model, optimizer)
    return model, drt, optimizer


@pytest.mark.parametrize("installed", [False, True], ids=["", "installed anew"])
def test_a_step_that_has_raised_can_be_made_again(installed):
    model, drt, optimizer = begun()
    expected, _, other = begun()
    backward(model)
    gradients = {p: p.grad for p in trained(model)}
    failed_step(model, optimizer)
    failed_step(model, optimizer)
    if installed:
        drt.install(optimizer)
    optimizer.step()
    assert all(p.grad is gradient for p, gradient in gradients.items())
    step(expected, other)
    assert_same(model, expected)


@pytest.mark.parametrize("clear", [lambda m, o: o.zero_grad(), lambda m, o: m.zero_grad()], ids=["optimizer", "model"])
def test_gradients_that_were_cleared_after_a_step_that_has_raised_are_not_applied(clear):
    """Nor is that of a weight which gets none in the next backward pass."""
    model, _, optimizer = begun()
    expected, _, other = begun()
    backward(model)
    failed_step(model, optimizer)
    clear(model, optimizer)
    for each, own in ((model, optimizer), (expected, other)):
        backward(each)
        layer_of(each, Q).U.grad = layer_of(each, Q).V.grad = None
        own.step()
    assert layer_of(model, Q).U.grad is None
    assert_same(model, expected)


def matrices_alone(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".U", ".V")))
    return adamw(model)


UNCLEAR = {
    "computed on top": (adamw, backward),
    "cleared in place": (adamw, lambda model: (model.zero_grad(set_to_none=False), backward(model))),
    "clipped again": (adamw, lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3)),
    "nothing to tell by": (matrices_alone, lambda model: None),
}


@pytest.mark.parametrize(("make", "between"), UNCLEAR.values(), ids=UNCLEAR)
def test_where_it_is_unclear_what_a_step_that_has_raised_has_left_the_next_is_refused(make, between):
    model, _, optimizer = begun(make=make)
    expected, _, other = begun(make=make)
    backward(model)
    failed_step(model, optimizer)
    between(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"before has raised, .* Clear all .*zero_grad\(set_to_none=True\), compute"
        ):
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    optimizer.zero_grad(set_to_none=True)
    step(model, optimizer)
    step(expected, other)
    assert_same(model, expected)


def test_zero_gradients_are_gradients_and_missing_ones_are_none():
    """As under torch.optim.Muon: momentum goes on where a gradient is zero."""
    model = tiny.llama()
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 1)
    W = model.get_submodule(Q).weight
    before = W.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(W, before)
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    momentum = optimizer.state[W][MOMENTUM].clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[W][MOMENTUM], 0.9 * momentum)
    assert not torch.equal(W, before)


@pytest.mark.parametrize("frozen", ["U", "V", "layer", "dense layer"])
def test_what_is_frozen_does_not_move(frozen):
    model = tiny.llama()
    drt = controller(model, "dense@0 factored@9" if frozen == "dense layer" else "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    weights = [getattr(layer, frozen)] if frozen in "UV" else list(trainable_weights(layer))
    for weight in weights:
        weight.requires_grad_(False)
    before = [w.detach().clone() for w in weights]
    others = [w for w in trainable_weights(layer) if w.requires_grad]
    moving = [w.detach().clone() for w in others]
    for k in range(3):
        drt.begin_step(k, optimizer)
        step(model, optimizer)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert not any(torch.equal(w, b) for w, b in zip(others, moving, strict=True))
    assert not any(MOMENTUM in optimizer.state.get(w, {}) for w in weights)


@pytest.mark.parametrize("init", ["zero", "principal"])
@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_adapters_start_and_stay_bounded_over_fifty_steps(init, alpha):
    model = tiny.llama()
    drt = controller(model, "adapter@0 dense@60", 64, adapter_init=init, adapter_alpha=alpha, matrix_lr=0.02)
    optimizer = adamw(model, weight_decay=0.0)
    drt.begin_step(0, optimizer)
    begun = {name: effective_weight(layer_of(model, name)).detach().clone() for name in drt.targets}
    sizes = {p: p.norm().item() for p in trained(model)}
    losses = []
    for k in range(50):
        drt.begin_step(k, optimizer)
        loss = model(**tiny.batch()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    for name, W in begun.items():
        layer = layer_of(model, name)
        L, R, s = layer.pair()
        assert L.any()
        out, into = W.shape
        moved = torch.linalg.matrix_norm(effective_weight(layer) - W, 2).item()
        assert moved < 50 * 0.02 * max(1, out / into) ** 0.5 * 1.21
        for X in (L, R):
            assert X.norm().item() < 10 * (sizes[X] + 4 * 50 * 0.02 / s)


# ---- what has no part in a step


def test_experts_without_tokens_stay_where_they_are():
    model = tiny.mixtral(num_local_experts=8, num_experts_per_tok=1)
    drt = controller(model, "dense@0 factored@9", include=["experts"])
    optimizer = adamw(model, weight_decay=0.0)
    drt.begin_step(0, optimizer)
    backward(model)
    name = next(iter(drt.targets))
    weight = layer_of(model, name).weight
    idle = ~weight.grad.flatten(1).any(1)
    if not idle.any():
        weight.grad[:3] = 0
        idle[:3] = True
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight[idle], before[idle])
    assert all(not torch.equal(W, b) for W, b in zip(weight[~idle], before[~idle], strict=True))


def test_tied_weights_are_no_targets_and_keep_the_runs_own_optimizer():
    model = tiny.llama(tie_word_embeddings=True)
    drt = controller(model, "factored@0 dense@6")
    optimizer = adamw(model)
    loop(drt, optimizer)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    assert "exp_avg" in optimizer.state[weight]
    assert MOMENTUM not in optimizer.state[weight]
    assert MOMENTUM in optimizer.state[layer_of(model, Q).weight]


def test_a_layer_that_is_gone_is_named_and_nothing_moves():
    """Its weights would else take steps of the run's own optimizer, at the matrices' rate."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 1)
    model.get_submodule("model.layers.0.self_attn").q_proj = nn.Sequential(layer_of(model, Q))
    backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"weight of shape \(32, 4\) .* its layer is no longer where it was .* after all"
    ):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_model_that_is_gone_holds_up_no_other():
    """Its weights are in the optimizer still, gradients and all."""
    models = [tiny.llama(), tiny.llama()]
    drts = [controller(model, "factored@0 dense@9") for model in models]
    optimizer = torch.optim.AdamW([{"params": trained(m)} for m in models], lr=1e-2)
    for drt in drts:
        drt.begin_step(0, optimizer)
        backward(drt.model)
    del models[1], drts[1], drt
    gc.collect()
    before = layer_of(models[0], Q).U.detach().clone()
    optimizer.step()
    assert not torch.equal(layer_of(models[0], Q).U, before)


class Plain(torch.optim.Optimizer):
    """Gradient descent without weight_decay, and with state from the start, as Adagrad has it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("moments", ["project", "reset"])
def test_an_optimizer_without_decay_and_with_state_of_its_own(moments):
    """What it has made for the matrices is of no use, and must not stand for a moment that is zero."""
    name = f"{Plain.__module__}.{Plain.__qualname__}"
    OPTIMIZERS.add(name, OptimizerRule("a toy", MomentKeys(second=("sum",))))
    try:
        model = tiny.llama()
        drt = controller(model, "dense@0 factored@2", moments=moments)
        optimizer = Plain(trained(model))
        loop(drt, optimizer, 0, 2)
        assert optimizer.state[layer_of(model, Q).weight].keys() == {"step", MOMENTUM}
        drt.begin_step(2, optimizer)
        assert (MOMENTUM in optimizer.state.get(layer_of(model, Q).U, {})) == (moments == "project")
        loop(drt, optimizer, 2, 4)
    finally:
        OPTIMIZERS.remove(name)


# ---- what it cannot do


@pytest.mark.parametrize("decomposition", ["tucker", "cp"])
def test_kernels_of_more_tensors_than_two_are_refused(decomposition):
    message = rf"matrix_optimizer is of a product U V, and decomposition='{decomposition}' is of .* Use decomp.*'svd'"
    with pytest.raises(ValueError, match=message):
        controller(tiny.resnet(), "factored@0 dense@6", decomposition=decomposition, rank=2)


def test_frobenius_decay_beside_it_would_have_no_effect():
    message = r"frobenius_decay .* matrix_optimizer=muon decays the product anyway\. Give one of the two"
    with pytest.raises(ValueError, match=message):
        controller(tiny.llama(), "factored@0 dense@6", frobenius_decay=True)


def test_a_callback_has_no_groups_for_it(tmp_path):
    args = T.TrainingArguments(output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    callback = DRTCallback(DRTConfig(schedule="factored@0 dense@50%", rank=4, matrix_optimizer="muon"))
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this needs parameter groups .* Use DRTT"):
        T.Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback])
