"""Schedule-free optimizers through changes of form: new weights train as under a new optimizer, whatever the step."""

import copy
import functools
import math

import pytest
import tiny
import torch
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import trainable_weights
from hf_drt.simulate import batch_spec, estimate_run

LAYER = "model.layers.0.mlp.up_proj"
LR = 1e-3
KINDS = [AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree]
PLAN = "dense@0 factored@300 dense@306 adapter@312"
kinds = pytest.mark.parametrize("kind", KINDS)


def backward(model, seed):
    torch.manual_seed(seed)
    model(**tiny.batch()).loss.backward()


def step(model, optimizer, seed):
    optimizer.train()
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def dense_phase(kind, warm_up, settings):
    torch.manual_seed(0)
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule=PLAN, rank=4, **dict(settings)), 330)
    drt.apply(0)
    options = {"warmup_steps": warm_up} if warm_up else {}
    optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=LR, **options)
    for k in range(300):
        drt.begin_step(k, optimizer)
        step(model, optimizer, k)
    return model, drt, optimizer


def trained(kind, until=300, warm_up=0, **settings):
    """A model, its controller and optimizer, just before update ``until``; a copy of its own."""
    model, drt, optimizer = copy.deepcopy(dense_phase(kind, warm_up, tuple(settings.items())))
    for k in range(300, until):
        drt.begin_step(k, optimizer)
        step(model, optimizer, k)
    return model, drt, optimizer


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.sampled(1)
@kinds
def test_new_weights_train_bitwise_as_under_an_optimizer_of_their_own(kind):
    model, drt, optimizer = trained(kind)
    drt.begin_step(300, optimizer)
    twin = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    new = [names[id(p)] for layer in drt.targets for p in trainable_weights(model.get_submodule(layer))]
    kept = [names[id(p)] for p in held(optimizer) if names[id(p)] not in new]
    weights = dict(twin.named_parameters())
    old, young = (kind([weights[name] for name in group], lr=LR) for group in (kept, new))
    own = copy.deepcopy(optimizer.state_dict())
    state = {i: own["state"][held_index(optimizer, model, name)] for i, name in enumerate(kept)}
    old.load_state_dict({"state": state, "param_groups": [own["param_groups"][0] | {"params": list(range(len(kept)))}]})
    for k in range(300, 306):
        drt.begin_step(k, optimizer)
        step(model, optimizer, k)
        for each in (old, young):
            each.train()
        backward(twin, k)
        for each in (old, young):
            each.step()
            each.zero_grad()
        assert [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])] == [], k
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["k"] == 306
    assert {optimizer.state[dict(model.named_parameters())[name]]["k"] for name in new} == {6}


def held_index(optimizer, model, name):
    wanted = dict(model.named_parameters())[name]
    return next(index for index, p in enumerate(held(optimizer)) if p is wanted)


@pytest.mark.parametrize("switch", [300, 306, 312])
def test_the_first_step_of_a_new_weight_late_in_a_run_is_the_learning_rate(switch):
    """By the count of its group it would be 16 rates at step 300: the iterate's, of which the weight shows a tenth."""
    model, drt, optimizer = trained(AdamWScheduleFree, switch)
    drt.begin_step(switch, optimizer)
    weights = trainable_weights(model.get_submodule(LAYER))
    before = [weight.detach().clone() for weight in weights]
    step(model, optimizer, switch)
    for weight, value in zip(weights, before, strict=True):
        for moved in (weight, optimizer.state[weight]["z"]):
            assert (moved.detach() - value).abs().max() <= 1.01 * LR


def test_the_first_updates_of_radam_are_none_as_those_of_a_new_one():
    model, drt, optimizer = trained(RAdamScheduleFree)
    drt.begin_step(300, optimizer)
    U, _ = trainable_weights(model.get_submodule(LAYER))
    before = U.detach().clone()
    for k in range(300, 304):
        step(model, optimizer, k)
        assert torch.equal(U, before)
    step(model, optimizer, 304)
    assert 0 < (U - before).abs().max() < 2 * LR


def test_lr_scales_and_the_rewarm_up_reach_weights_with_counts_of_their_own():
    scales = {"factored_lr_scale": 0.5, "rewarmup_steps": 10, "rewarmup_start": 0.1}
    model, drt, optimizer = trained(AdamWScheduleFree, **scales)
    drt.begin_step(300, optimizer)
    U, _ = trainable_weights(model.get_submodule(LAYER))
    before = U.detach().clone()
    step(model, optimizer, 300)
    torch.testing.assert_close((U - before).abs().max(), torch.tensor(0.5 * 0.1 * LR), rtol=0.02, atol=0)
    assert {group["lr"] for group in optimizer.param_groups} == {LR}


def test_new_weights_do_not_go_through_the_warm_up_once_more():
    first = {}
    for warm_up in (0, 100, 601):
        model, drt, optimizer = trained(AdamWScheduleFree, warm_up=warm_up)
        drt.begin_step(300, optimizer)
        U, _ = trainable_weights(model.get_submodule(LAYER))
        before = U.detach().clone()
        step(model, optimizer, 300)
        first[warm_up] = (U - before).norm().item()
        assert optimizer.param_groups[0]["warmup_steps"] == warm_up
    assert math.isclose(first[100], first[0], rel_tol=0.02)
    assert math.isclose(first[601], first[0] * 301 / 601, rel_tol=0.02)


@kinds
def test_a_layer_changes_form_at_its_average_and_all_others_stay(kind):
    model, drt, optimizer = trained(kind, 306)
    evaluated, other = copy.deepcopy((model, optimizer))
    y = {name: p.detach().clone() for name, p in model.named_parameters()}
    other.eval()
    U, _ = trainable_weights(evaluated.get_submodule(LAYER))
    assert not torch.equal(U, trainable_weights(model.get_submodule(LAYER))[0])
    averages = {name: evaluated.get_submodule(name).weight.detach() for name in drt.targets}
    drt.begin_step(306, optimizer)
    for name in drt.targets:
        torch.testing.assert_close(model.get_submodule(name).weight, averages[name], rtol=1e-5, atol=1e-7)
    kept = [name for name in y if name in dict(model.named_parameters()) and not name.startswith(tuple(drt.targets))]
    assert kept
    assert [name for name in kept if not torch.equal(model.get_parameter(name), y[name])] == []
    assert optimizer.param_groups[0]["train_mode"]


@kinds
def test_to_dense_merges_layers_at_their_average_too(kind):
    model, drt, optimizer = trained(kind, 306)
    evaluated, other = copy.deepcopy((model, optimizer))
    in_training = {name: model.get_submodule(name).weight.detach().clone() for name in drt.targets}
    other.eval()
    averages = {name: evaluated.get_submodule(name).weight.detach() for name in drt.targets}
    drt.to_dense(optimizer)
    for name in drt.targets:
        W = model.get_submodule(name).weight
        torch.testing.assert_close(W, averages[name], rtol=1e-5, atol=1e-7)
        assert (W - in_training[name]).norm() > 10 * (W - averages[name]).norm()
    step(model, optimizer, 306)
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}


def test_the_function_error_compares_what_is_evaluated():
    model, drt, optimizer = trained(AdamWScheduleFree, 306)
    probe = lambda: model(**tiny.batch()).logits.detach()  # noqa: E731
    assert drt.begin_step(306, optimizer, probe).function_error < 1e-5


def test_a_switch_that_fails_leaves_the_weights_as_they_are_in_training():
    model, drt, optimizer = trained(AdamWScheduleFree)
    bad = model.get_submodule(list(drt.targets)[-1]).weight
    with torch.no_grad():
        bad[0, 0] = torch.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="holds inf or nan"):
        drt.begin_step(300, optimizer)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)


def test_weights_born_at_different_steps_in_one_group_have_each_their_count():
    torch.manual_seed(0)
    model = tiny.llama(num_hidden_layers=1)
    parts = [
        DynamicRank(model, DRTConfig(schedule=plan, rank=4, include=[f"layers.0.{part}"]), 12)
        for part, plan in (("mlp", "dense@0 factored@4"), ("self_attn", "dense@0 factored@7"))
    ]
    for drt in parts:
        drt.apply(0)
    optimizer = AdamWScheduleFree(model.parameters(), lr=LR)
    for k in range(10):
        for drt in parts:
            drt.begin_step(k, optimizer)
        step(model, optimizer, k)
        assert len(optimizer.param_groups) == 1
    counts = {name: optimizer.state[p].get("k") for name, p in model.named_parameters()}
    assert {count for name, count in counts.items() if ".mlp." in name} == {6}
    assert {count for name, count in counts.items() if "self_attn" in name} == {3}
    assert counts["model.embed_tokens.weight"] is None
    assert optimizer.param_groups[0]["k"] == 10


def test_after_a_step_that_raised_the_groups_are_whole_again():
    model, drt, optimizer = trained(AdamWScheduleFree, 302)
    drt.begin_step(302, optimizer)
    twin, other, aside = copy.deepcopy((model, optimizer, drt))
    aside.install(other)

    def fails():
        raise RuntimeError("no loss")

    optimizer.train()
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fails)
    for each, used in ((model, optimizer), (twin, other)):
        step(each, used, 302)
    assert len(optimizer.param_groups) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def interrupted(model, optimizer):
    """A step that raises between the hooks around it."""

    def fails():
        raise RuntimeError("no loss")

    optimizer.train()
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fails)
    optimizer.zero_grad()


@kinds
def test_a_switch_after_a_step_that_raised_leaves_no_weight_untrained(kind):
    runs = [trained(kind, 306) for _ in range(2)]
    for index, (model, drt, optimizer) in enumerate(runs):
        if index == 0:
            interrupted(model, optimizer)
        for k in range(306, 309):
            drt.begin_step(k, optimizer)
            assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
            step(model, optimizer, k)
        assert len(held(optimizer)) == len(list(model.parameters()))
    (model, _, _), (other, _, _) = runs
    assert [n for n, p in model.named_parameters() if not torch.equal(p, other.get_parameter(n))] == []


def test_a_checkpoint_after_a_step_that_raised_is_that_before_it():
    scales = {"factored_lr_scale": 0.5}
    model, drt, optimizer = trained(AdamWScheduleFree, 303, **scales)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    interrupted(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"] == before
    fresh, again, other = trained(AdamWScheduleFree, 303, **scales)
    interrupted(fresh, other)
    other.load_state_dict(saved)
    for each, own, used in ((model, drt, optimizer), (fresh, again, other)):
        own.begin_step(303, used)
        step(each, used, 303)
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in model.named_parameters())


def test_rules_that_are_installed_after_a_step_that_raised_find_whole_groups():
    model, drt, optimizer = trained(AdamWScheduleFree, 303)
    interrupted(model, optimizer)
    drt.install(optimizer)
    assert len(optimizer.param_groups) == 1
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_a_checkpoint_of_what_was_evaluated_resumes_bitwise_too(tmp_path, name):
    """A plain Trainer writes the average where it has evaluated just before, and the weights of training elsewhere."""
    settings = {
        "optim": name, "max_steps": 9, "drt_schedule": "factored:4@0 dense@3 adapter:4@6", "drt_export": "native",
        "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.5, "warmup_steps": 3,
    }  # fmt: skip
    straight = tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=1, **settings)
    straight.train()
    for at in range(1, 9):
        resumed = tiny.trainer(tmp_path / "b", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
        weights = resumed.model.state_dict()
        assert [n for n, p in straight.model.state_dict().items() if not torch.equal(p, weights[n])] == [], at
        own, other = (run.optimizer.state_dict() for run in (resumed, straight))
        assert own["param_groups"] == other["param_groups"]
        for index, entries in other["state"].items():
            for key, value in entries.items():
                assert torch.equal(torch.as_tensor(own["state"][index][key]), torch.as_tensor(value)), (index, key)


BESIDE = (
    r"matrix_optimizer=muon: {} averages the weights within its own step, and warms up there \(warmup_steps\)\. The "
    r"matrices have no part in it, .* Leave the setting out, or take optim='adamw_torch' with a scheduler\."
)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_a_trainer_refuses_the_matrix_optimizer_beside_it_when_it_is_made(tmp_path, name):
    with pytest.raises(ValueError, match=BESIDE.format(f"optim='{name}'")):
        tiny.trainer(tmp_path, optim=name, drt_schedule="factored:4@0 dense@3", drt_matrix_optimizer="muon")


@kinds
def test_a_loop_refuses_the_matrix_optimizer_beside_it_before_anything_changes(kind):
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="factored:4@0 dense@3", matrix_optimizer="muon"), 6)
    modules, optimizer = dict(model.named_modules()), kind(model.parameters(), lr=LR)
    for attempt in (drt.install, lambda o: drt.apply(0, o), lambda o: drt.begin_step(0, o)):
        with pytest.raises(ValueError, match=BESIDE.format(kind.__name__)):
            attempt(optimizer)
        assert dict(model.named_modules()) == modules
        assert len(optimizer.param_groups) == 1


def test_an_estimate_refuses_the_matrix_optimizer_beside_it():
    with torch.device("meta"):
        model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="factored:4@0 dense@3", matrix_optimizer="muon"), 6)
    with pytest.raises(ValueError, match=BESIDE.format("optim='schedule_free_sgd'")):
        estimate_run(drt, batch_spec(model, 2, 8), optimizer="schedule_free_sgd")


def test_without_a_switch_no_weight_has_counts_of_its_own(tmp_path):
    run = tiny.trainer(tmp_path, optim="schedule_free_adamw", drt_schedule="factored:4@0", drt_export="native")
    run.train()
    assert not any("k" in state for state in run.optimizer.state.values())
