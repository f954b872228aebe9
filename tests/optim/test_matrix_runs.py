"""The matrix optimizer through all forms: schedules, checkpoints, copies, several models."""

import copy

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from matrix_models import (
    FORMS,
    SETTINGS,
    STEPS,
    Q,
    adamw,
    assert_same,
    assert_same_tree,
    backward,
    controller,
    loop,
    matrix_group,
    ramp,
    step,
    trained,
)  # fmt: skip
from torch.optim.lr_scheduler import LambdaLR

from hf_drt import DRTConfig, DynamicRank
from hf_drt.compress import compress
from hf_drt.forms import layer_of, trainable_weights
from hf_drt.optim.matrices import MATRIX, MOMENTUM


@pytest.mark.parametrize("policy", ["project", "reset"])
def test_momentum_follows_the_change_of_form_by_the_chain_rule_or_is_dropped(policy):
    model = tiny.llama(hidden_size=48)
    drt = controller(model, "dense@0 factored@2 dense@4 adapter@6", moments=policy, adapter_init="principal")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 2)
    M = optimizer.state[layer_of(model, Q).weight][MOMENTUM].clone()
    drt.begin_step(2, optimizer)
    layer = layer_of(model, Q)
    if policy == "reset":
        assert not any(MOMENTUM in optimizer.state.get(w, {}) for w in trainable_weights(layer))
    else:
        torch.testing.assert_close(optimizer.state[layer.U][MOMENTUM], M @ layer.V.detach().mT)
        torch.testing.assert_close(optimizer.state[layer.V][MOMENTUM], layer.U.detach().mT @ M)
    loop(drt, optimizer, 2, 4)
    pair = [optimizer.state[w][MOMENTUM].clone() for w in trainable_weights(layer)]
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    drt.begin_step(4, optimizer)
    weight = layer_of(model, Q).weight
    if policy == "reset":
        assert MOMENTUM not in optimizer.state.get(weight, {})
    else:
        # The two know the momentum of W in the rows of V and in the columns of U, and agree nearly where both do.
        back = optimizer.state[weight][MOMENTUM]
        for found, expected in ((back @ V.mT, pair[0]), (U.mT @ back, pair[1])):
            assert (found - expected).norm() < 0.2 * expected.norm()
    loop(drt, optimizer, 4, 6)
    M = optimizer.state[weight][MOMENTUM].clone()
    drt.begin_step(6, optimizer)
    layer = layer_of(model, Q)
    L, R, s = layer.pair()
    if policy == "project":
        torch.testing.assert_close(optimizer.state[L][MOMENTUM], s * M @ R.detach().mT)
        torch.testing.assert_close(optimizer.state[R][MOMENTUM], s * L.detach().mT @ M)
    loop(drt, optimizer, 6, STEPS)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) <= held


RUNS = {
    "adamw_torch": {"drt_rewarmup_steps": 2, "drt_factored_lr_scale": 0.5, "max_grad_norm": 0.1},
    "adamw_torch_fused": {"drt_adapter_init": "principal", "drt_adapter_lr_scale": 2.0},
    "sgd": {"optim_args": "momentum=0.9", "drt_moments": "reset"},
    "adafactor": {},
    "rmsprop": {},
    "NAdam": {"weight_decay": 0.1},
    "RAdam": {},
    "Adam": {"drt_adapter_init": "principal"},
}


def run(folder, optim: str, changes: dict, resume: str | None = None):
    settings = {
        "max_steps": 12, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9", "drt_matrix_optimizer": "muon",
        "weight_decay": 0.05, "drt_export": "native", "logging_steps": 4, **changes,
    }  # fmt: skip
    if cls := getattr(torch.optim, optim, None):
        model = tiny.llama()
        args = tiny.arguments(folder, **settings)
        trainer = tiny.DRTTrainer(
            model=model, args=args, train_dataset=tiny.dataset(), optimizers=(cls(model.parameters(), lr=1e-3), None)
        )
    else:
        trainer = tiny.trainer(folder, optim=optim, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("optim", "changes"), RUNS.items(), ids=RUNS)
def test_a_run_through_all_forms_is_resumed_bitwise(tmp_path, optim, changes):
    expected = run(tmp_path / "a", optim, changes | {"save_strategy": "steps", "save_steps": 4})
    momenta = [s[MOMENTUM] for s in expected.optimizer.state_dict()["state"].values() if MOMENTUM in s]
    assert len(momenta) == 28
    assert all(m.any() for m in momenta)
    for at in (4, 8):
        checkpoint = str(tmp_path / "a" / f"checkpoint-{at}")
        assert_equal_runs(run(tmp_path / "b", optim, changes, checkpoint), expected)


@pytest.mark.parametrize("kind", ["resnet", "mixtral"])
def test_kernels_and_experts_go_through_all_forms_and_resume_bitwise(tmp_path, kind):
    def finished(folder, resume=None, **changes):
        settings = {"drt_schedule": "factored:2@0 dense@3 adapter:2@6", "drt_matrix_optimizer": "muon", "max_steps": 9}
        model, data = getattr(tiny, kind)(), kind if kind == "resnet" else "llama"
        trainer = tiny.trainer(folder, model, kind=data, drt_export="native", **settings, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    expected = finished(tmp_path / "a", save_strategy="steps", save_steps=4)
    for at in (4, 8):
        assert_equal_runs(finished(tmp_path / "b", str(tmp_path / "a" / f"checkpoint-{at}")), expected)


def test_the_rates_of_all_forms_follow_one_schedule():
    """The matrices' rate is their own, times the scheduler's multiplier, the form's and the re-warm-up's."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@3 adapter@6", factored_lr_scale=2.0, rewarmup_steps=2)
    optimizer = adamw(model)
    drt.install(optimizer)
    scheduler = LambdaLR(optimizer, ramp)
    seen = []
    for k in range(9):
        drt.begin_step(k, optimizer)
        weight = trainable_weights(layer_of(model, Q))[0]
        rate = matrix_group(optimizer, weight)["lr"]
        handle = optimizer.register_step_pre_hook(
            lambda o, *_, w=weight: seen.append(matrix_group(o, w)["lr"])  # after the rules' own hook
        )
        step(model, optimizer)
        handle.remove()
        scheduler.step()
        assert rate == pytest.approx(0.03 * ramp(k))
    shares = [2.0] * 3 + [0.1, 0.55, 1.0] * 2
    assert seen == pytest.approx([0.03 * ramp(k) * share for k, share in enumerate(shares)])


@pytest.mark.parametrize("schedule", FORMS)
def test_after_to_dense_it_goes_on_as_under_torch_muon(schedule):
    """The momentum of factors starts anew, that of dense weights goes on."""
    model = tiny.llama()
    drt = controller(model, schedule)
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 2)
    drt.to_dense(optimizer)
    twin = copy.deepcopy(model)
    W = twin.get_submodule(Q).weight
    muon = torch.optim.Muon([W], lr=0.03, momentum=0.9, weight_decay=0.1)
    if schedule.startswith("dense"):
        muon.state[W]["momentum_buffer"] = optimizer.state[model.get_submodule(Q).weight][MOMENTUM].clone()
    step(model, optimizer)
    backward(twin)
    muon.step()
    assert torch.equal(model.get_submodule(Q).weight, W)


def test_a_compressed_model_trains_on_in_its_factors():
    """They are those of the first phase already, and take the update of a pair."""
    model = tiny.llama()
    compress(model, rank=4)
    U, V = (w.detach().clone() for w in trainable_weights(layer_of(model, Q)))
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, weight_decay=0.0)
    loop(drt, optimizer, 0, 1)
    layer = layer_of(model, Q)
    moved = torch.linalg.matrix_norm(layer.U @ layer.V - U @ V, 2).item()
    assert 0.3 * 0.03 < moved < 1.3 * 0.03
    loop(drt, optimizer, 1, 8)


# ---- several models, own loops, copies


def test_two_controllers_in_one_optimizer_do_what_each_does_alone():
    def alone(schedule: str, **changes):
        model = tiny.llama()
        drt = controller(model, schedule, **changes)
        optimizer = adamw(model)
        loop(drt, optimizer)
        return model

    schedules = ({"schedule": "factored@0 dense@6"}, {"schedule": "dense@0 adapter@4", "matrix_lr": 0.01})
    expected = [alone(**settings) for settings in schedules]
    models = [tiny.llama(), tiny.llama()]
    drts = [controller(model, **settings) for model, settings in zip(models, schedules, strict=True)]
    optimizer = torch.optim.AdamW([{"params": trained(m)} for m in models], lr=1e-2, weight_decay=0.1)
    for k in range(STEPS):
        for drt in drts:
            drt.begin_step(k, optimizer)
            backward(drt.model)
        optimizer.step()
        optimizer.zero_grad()
    for model, other in zip(models, expected, strict=True):
        assert_same(model, other)


def test_one_of_two_controllers_may_leave_its_matrices_to_the_optimizer():
    models = [tiny.llama(), tiny.llama()]
    drts = [
        controller(models[0], "dense@0 factored@9"),
        DynamicRank(models[1], DRTConfig(schedule="dense@0 factored@9", rank=4), STEPS),
    ]
    drts[1].apply(0)
    twin, other = tiny.llama(), None
    optimizer = torch.optim.AdamW([{"params": trained(m)} for m in models], lr=1e-2)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for k in range(3):
        for drt in drts:
            drt.begin_step(k, optimizer)
            backward(drt.model)
        optimizer.step()
        optimizer.zero_grad()
        step(twin, other)
    assert_same(models[1], twin)
    assert not torch.equal(models[0].get_submodule(Q).weight, twin.get_submodule(Q).weight)


def test_an_install_after_the_scheduler_is_refused():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    LambdaLR(optimizer, ramp)
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this adds parameter groups, .* Call drt\."):
        drt.install(optimizer)
    assert not any(MATRIX in group for group in optimizer.param_groups)


@pytest.mark.parametrize("loaded", [False, True], ids=["as made", "loaded"])
@pytest.mark.parametrize("change", [{"matrix_lr": 0.5}, {"matrix_momentum": 0.5}, None], ids=str)
def test_settings_of_groups_that_are_there_cannot_change(change, loaded):
    """They would have no effect: a scheduler has taken over the rates. It changes them, and not what was asked for."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    scheduler = LambdaLR(optimizer, ramp)
    step(model, optimizer)
    scheduler.step()
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    settings = {} if change is None else SETTINGS | change
    other = DynamicRank(model, DRTConfig(schedule="factored@0 dense@9", rank=4, **settings), STEPS)
    message = r"other values of .*matrix_optimizer \(with matrix_lr and matrix_momentum\); .* Make a new optimizer, or"
    with pytest.raises(ValueError, match=message):
        other.begin_step(1, optimizer)
    assert optimizer.state_dict()["param_groups"] == before
    same = DynamicRank(model, DRTConfig(schedule="factored@0 dense@9", rank=4, **SETTINGS), STEPS)
    same.begin_step(1, optimizer)
    assert optimizer.state_dict()["param_groups"] == before


ADAPTIVE = ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD", "Adagrad", "Adadelta", "ASGD"]


def only_matrices(name: str, **settings) -> tuple[DynamicRank, torch.optim.Optimizer]:
    """All weights but the target layers' are frozen."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@3 adapter@6", **settings)
    kept = {id(w) for target in drt.targets for w in trainable_weights(layer_of(model, target))}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    return drt, getattr(torch.optim, name)(trained(model), lr=1e-2)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("at", [5, 8])
def test_a_state_dict_of_matrices_alone_is_loaded_and_trained_on_bitwise(name, at):
    """Optimizers look in every parameter's state for entries of their own steps."""
    drt, optimizer = only_matrices(name)
    loop(drt, optimizer, 0, at)
    weights, state, structure = copy.deepcopy((drt.model.state_dict(), optimizer.state_dict(), drt.state_dict()))
    loop(drt, optimizer, at)
    other, fresh = only_matrices(name)
    other.install(fresh)
    other.load_state_dict(structure, fresh)
    other.model.load_state_dict(weights)
    fresh.load_state_dict(state)
    loop(other, fresh, at)
    assert_same(other.model, drt.model)
    assert_same_tree(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_copy_of_an_optimizer_over_matrices_goes_on_to_the_same_bits(name):
    drt, optimizer = only_matrices(name)
    copies = []
    for k in range(1, STEPS, 5):
        loop(drt, optimizer, max(k - 5, 0), k)
        copies.append((k, *copy.deepcopy((drt, optimizer))))
    loop(drt, optimizer, k)
    for k, twin, its_optimizer in copies:
        loop(twin, its_optimizer, k)
        assert_same(twin.model, drt.model)


def test_a_state_dict_is_plain_tensors(tmp_path):
    drt, optimizer = only_matrices("NAdam")
    loop(drt, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert_same_tree(found, optimizer.state_dict())


def test_a_state_dict_loaded_before_the_install_is_refused_by_the_number_of_groups():
    drt, optimizer = only_matrices("AdamW")
    loop(drt, optimizer, 0, 2)
    other, fresh = only_matrices("AdamW")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict(optimizer.state_dict())
    other.install(fresh)
    fresh.load_state_dict(optimizer.state_dict())


def test_a_compiled_model_trains_as_the_eager_one(tmp_path):
    """The backend that compiles nothing: the trainer's wrapper and the layers are the same."""
    settings = {"max_steps": 6, "drt_schedule": "factored@0 dense@2 adapter@4", "drt_matrix_optimizer": "muon"}
    runs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        trainer = tiny.trainer(tmp_path, model=tiny.llama(), drt_export="native", **settings, **changes)
        trainer.train()
        runs.append(trainer.model)
    for (name, p), q in zip(runs[0].state_dict().items(), runs[1].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4, msg=name)


def test_states_from_before_the_momentum_of_today():
    """Those with a matrix optimizer had 0.95 where none was given; those without one are of no momentum at all."""
    drt = controller(tiny.llama(), "factored@0 dense@9", matrix_momentum=0.95)
    state = drt.state_dict()
    assert "matrix_momentum" not in state["settings"]
    controller(tiny.llama(), "factored@0 dense@9", matrix_momentum=0.95).load_state_dict(state)
    today = DRTConfig().matrix_momentum
    message = rf"matrix_momentum is {today} here, and 0\.95 in the state\. Resume .* then: set matrix_momentum=0\.95\."
    with pytest.raises(ValueError, match=message):
        controller(tiny.llama(), "factored@0 dense@9", matrix_momentum=today).load_state_dict(state)
    plain = {"matrix_optimizer": "none", "matrix_lr": DRTConfig().matrix_lr, "matrix_momentum": today}
    without = controller(tiny.llama(), "factored@0 dense@9", **plain)
    state = without.state_dict()
    assert not {"matrix_optimizer", "matrix_lr", "matrix_momentum"} & state["settings"].keys()
    without.load_state_dict(state)
