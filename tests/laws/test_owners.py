"""Laws of several controllers on one optimizer: each does what it would do on an optimizer of its own."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.optim import owners

STEPS = 8
PLANS = ("factored@0 dense@3 factored@5", "dense@0 adapter@2 factored@6", "adapter@0 dense@4 factored@6")
RULES = (
    {"rewarmup_steps": 3, "factored_lr_scale": 2.0, "frobenius_decay": True},
    {"rewarmup_steps": 2, "adapter_lr_scale": 0.5},
    {"factored_lr_scale": 3.0, "adapter_lr_scale": 4.0, "rewarmup_steps": 1, "rewarmup_start": 0.3},
)


def controllers(kinds=("llama", "gpt2"), rules=RULES):
    made = []
    for kind, schedule, rule in zip(kinds, PLANS, rules, strict=False):
        made.append(DynamicRank(tiny.MODELS[kind]().eval(), DRTConfig(schedule=schedule, rank=4, **rule), STEPS))
        made[-1].apply(0)
    return made


def trainable(drt):
    return [p for p in drt.model.parameters() if p.requires_grad]


def adamw(*drts, together=False):
    """A group for each model, or one for all."""
    if together:
        return torch.optim.AdamW([p for drt in drts for p in trainable(drt)], lr=1e-2, weight_decay=0.1)
    return torch.optim.AdamW([{"params": trainable(drt)} for drt in drts], lr=1e-2, weight_decay=0.1)


def train(drts, optimizers, steps=range(STEPS), schedulers=()):
    for step in steps:
        for drt in drts:
            drt.begin_step(step, optimizers.get(drt))
            drt.model(**tiny.batch()).loss.backward()
        for optimizer in dict.fromkeys(optimizers.values()):
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def weights(drt):
    return {name: p.detach().clone() for name, p in drt.model.state_dict().items()}


def assert_equal(drts, expected):
    for drt, other in zip(drts, expected, strict=True):
        assert drt.phase == other.phase
        for name, tensor in other.model.state_dict().items():
            assert torch.equal(drt.model.state_dict()[name], tensor), name


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def trained_apart(kinds, rules=RULES):
    """Every controller with an optimizer and a scheduler of its own."""
    drts = controllers(kinds, rules)
    alone = {drt: adamw(drt) for drt in drts}
    for drt, optimizer in alone.items():
        drt.install(optimizer)
    train(drts, alone, schedulers=[decaying(optimizer) for optimizer in alone.values()])
    return drts


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("llama", "llama", "gpt2")], ids=["two", "three"])
def test_one_optimizer_for_all_trains_as_one_for_each(kinds, wrapped):
    expected = trained_apart(kinds)
    drts = controllers(kinds)
    optimizer = adamw(*drts)
    used = Accelerator(cpu=True).prepare_optimizer(optimizer) if wrapped else optimizer
    for drt in drts:
        drt.install(used)
    train(drts, dict.fromkeys(drts, used), schedulers=[decaying(optimizer)])
    assert_equal(drts, expected)


@pytest.mark.parametrize("order", [1, -1], ids=["as stepped", "reversed"])
def test_lr_scales_and_frobenius_decay_work_within_one_group_of_both_models(order):
    rules = [{key: value for key, value in rule.items() if "rewarmup" not in key} for rule in RULES]
    expected = trained_apart(("llama", "gpt2"), rules)
    drts = controllers(rules=rules)
    optimizer = adamw(*drts, together=True)
    for drt in drts[::order]:
        drt.install(optimizer)
    assert len(optimizer.param_groups) == 1 + 1 + 1
    train(drts, dict.fromkeys(drts, optimizer), schedulers=[decaying(optimizer)])
    assert_equal(drts, expected)


@pytest.mark.parametrize("first", [0, 1], ids=["re-warms first", "re-warms last"])
def test_a_rewarmup_in_a_group_that_another_model_shares_is_refused_before_anything_changes(first):
    rules = ({"rewarmup_steps": 2}, {"factored_lr_scale": 2.0})
    drts = controllers(rules=rules if first == 0 else rules[::-1])
    optimizer = adamw(*drts, together=True)
    drts[0].begin_step(0, optimizer)
    groups, before = copy.deepcopy(optimizer.state_dict()), weights(drts[1])
    message = (
        r"rewarmup_steps scales the learning rate of whole parameter groups .* but group 0 of the optimizer holds the "
        r"weights of two models .* Give each model a parameter group of its own: .*; or set rewarmup_steps=0\."
    )
    for attempt in (drts[1].install, lambda o: drts[1].begin_step(2, o), lambda o: drts[1].apply(2, o)):
        with pytest.raises(ValueError, match=message):
            attempt(optimizer)
        assert optimizer.state_dict() == groups
        assert drts[1].phase == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in drts[1].model.state_dict().items())
    drts[0].begin_step(1, optimizer)
    assert len(owners(optimizer)) == 1


def test_a_rewarmup_leaves_groups_alone_that_hold_none_of_its_models_weights():
    (drt,) = controllers(("llama",))
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD([{"params": trainable(drt)}, {"params": other.parameters()}], lr=1.0)
    seen = []
    drt.begin_step(0, optimizer)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    drt.begin_step(3, optimizer)
    optimizer.step()
    assert seen == [[pytest.approx(0.1), 1.0, 2.0]]  # the last is empty in a dense phase
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]


# ---- two controllers over one model


def test_two_controllers_over_one_model_do_what_one_over_both_parts_does():
    rule = {"rank": 4, "schedule": PLANS[0], **RULES[0]}
    expected = DynamicRank(tiny.llama(), DRTConfig(**rule), STEPS)
    expected.apply(0)
    optimizer = adamw(expected)
    train([expected], {expected: optimizer})
    model = tiny.llama()
    parts = [DynamicRank(model, DRTConfig(include=include, **rule), STEPS) for include in (["self_attn"], ["mlp"])]
    for part in parts:
        part.apply(0)
    optimizer = adamw(parts[0])
    for step in range(STEPS):
        for part in parts:
            part.begin_step(step, optimizer)
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.param_groups) == 3
    assert_equal(parts[:1], [expected])


# ---- controllers that come and go


@pytest.mark.parametrize("again", ["the same", "a new one", "a new one of a part"])
def test_installing_again_scales_once(again):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0", rank=4, factored_lr_scale=2.0), STEPS)
    drt.apply(0)
    optimizer = torch.optim.SGD(trainable(drt), lr=1.0)
    drt.install(optimizer)
    if again != "the same":
        drt = DynamicRank(drt.model, DRTConfig(schedule="factored@0", rank=4, factored_lr_scale=2.0), STEPS)
        drt.apply(0)
    drt.install(optimizer)
    assert len(owners(optimizer)) == 1
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    optimizer.step()
    assert (seen, [group["lr"] for group in optimizer.param_groups]) == ([[1.0, 2.0]], [1.0, 1.0])


def test_a_new_controller_of_a_model_takes_over_its_rules_and_leaves_the_other_models():
    old, other = controllers()
    optimizer = adamw(old, other)
    for drt in (old, other):
        drt.begin_step(0, optimizer)
    for drt in (old, other):
        drt.begin_step(2, optimizer)
    config = replace(old.config, rewarmup_steps=0)
    new = DynamicRank(old.model, config, STEPS)
    groups = len(optimizer.param_groups)
    new.begin_step(4, optimizer)
    assert len(optimizer.param_groups) == groups
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.extend(group["lr"] for group in o.param_groups))
    optimizer.step()
    assert new.lr_factor() == 1
    assert other.lr_factor() == pytest.approx(0.1)
    assert seen == pytest.approx([1e-2, 1e-3, 2e-2, 5e-4])


def test_new_settings_that_decide_the_groups_are_refused_on_an_old_optimizer():
    old, other = controllers()
    optimizer = adamw(old, other)
    for drt in (old, other):
        drt.begin_step(0, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    changes = ({"factored_lr_scale": 5.0}, {"frobenius_decay": False}, {"include": ["self_attn"]},
               {"factored_lr_scale": 1.0, "frobenius_decay": False})  # fmt: skip
    for change in changes:
        new = DynamicRank(old.model, replace(old.config, **change), STEPS)
        with pytest.raises(ValueError, match=r"parameter groups of an earlier DynamicRank .* Make a new optimizer"):
            new.begin_step(0, optimizer)
        assert optimizer.state_dict() == before
        assert [owner.factor().__self__ for owner in owners(optimizer)] == [old, other]


def test_a_controller_that_is_gone_leaves_its_scales_and_nothing_else():
    gone, left = controllers()
    optimizer = adamw(gone, left)
    for drt in (gone, left):
        drt.begin_step(0, optimizer)
    gone.begin_step(3, optimizer)
    gone.begin_step(5, optimizer)  # factored again, and in its re-warm-up
    models = weakref.ref(gone.model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    optimizer.step()
    del gone, drt
    gc.collect()
    assert models() is None
    optimizer.step()
    assert seen[0] == pytest.approx([1e-3, 1e-2, 2e-3, 5e-3])
    assert seen[1] == pytest.approx([1e-2, 1e-2, 2e-2, 5e-3])
    left.begin_step(2, optimizer)
    (third,) = controllers(("bert",))
    optimizer.add_param_group({"params": trainable(third), "weight_decay": 0.0})
    third.install(optimizer)
    assert [owner.number for owner in owners(optimizer)] == [0, 1, 2]


# ---- across a checkpoint


@pytest.mark.sampled(5)
@pytest.mark.parametrize("at", range(1, STEPS))
@pytest.mark.parametrize("together", [False, True], ids=["groups", "one group"])
def test_both_are_resumed_bitwise(at, together):
    rules = [{k: v for k, v in rule.items() if not together or "rewarmup" not in k} for rule in RULES]

    def started(states=None):
        drts = controllers(rules=rules)
        optimizer = adamw(*drts, together=together)
        for i, drt in enumerate(drts):
            drt.install(optimizer)
            if states is not None:
                drt.load_state_dict(states[i], optimizer)
        return drts, optimizer

    straight, optimizer = started()
    train(straight, dict.fromkeys(straight, optimizer))
    first, optimizer = started()
    train(first, dict.fromkeys(first, optimizer), range(at))
    stored = copy.deepcopy(([drt.state_dict() for drt in first], [drt.model.state_dict() for drt in first]))
    options = copy.deepcopy(optimizer.state_dict())
    drts, optimizer = started(stored[0])
    for drt, tensors in zip(drts, stored[1], strict=True):
        drt.model.load_state_dict(tensors)
    optimizer.load_state_dict(options)
    train(drts, dict.fromkeys(drts, optimizer), range(at, STEPS))
    assert_equal(drts, straight)


def test_the_groups_of_the_first_owner_are_as_they_always_were():
    drts = controllers()
    optimizer = adamw(*drts)
    for drt in drts:
        drt.install(optimizer)
    marks = [{k: v for k, v in group.items() if k in ("drt_form", "drt_parent", "drt_owner")}
             for group in optimizer.param_groups]  # fmt: skip
    assert marks == [
        {},
        {},
        {"drt_form": "factored", "drt_parent": 0},
        {"drt_form": "adapter", "drt_parent": 1, "drt_owner": 1},
    ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_copied_optimizer_keeps_the_form_groups_of_each(order):
    drts = controllers()
    optimizer = adamw(*drts)
    for drt in drts:
        drt.install(optimizer)
    both = copy.deepcopy((optimizer, nn.ModuleList(drt.model for drt in drts)))
    for i in order:
        new = DynamicRank(both[1][i], drts[i].config, STEPS)
        new.begin_step(0, both[0])
        assert [owner.number for owner in owners(both[0]) if owner.model() is new.model] == [i]
    assert len(both[0].param_groups) == 4


# ---- groups that two models share


def test_names_of_two_models_in_one_group_follow_a_switch():
    drts = controllers(rules=({}, {}))
    named = [(f"{i}.{n}", p) for i, drt in enumerate(drts) for n, p in drt.model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=1e-2)
    for step in range(STEPS):
        for i, drt in enumerate(drts):
            drt.begin_step(step, optimizer)
            (group,) = optimizer.param_groups
            present = {f"{j}.{n}": p for j, other in enumerate(drts) for n, p in other.model.named_parameters()}
            assert all(present[n] is p for n, p in zip(group["param_names"], group["params"], strict=True)), (step, i)


def test_experts_that_share_a_group_with_another_model_stand_in_model_order():
    drts = [DynamicRank(make(), DRTConfig(schedule=PLANS[0], rank=4), STEPS) for make in (tiny.mixtral, tiny.llama)]
    for drt in drts:
        drt.apply(0)
    optimizer = adamw(*drts, together=True)
    for step in range(STEPS):
        for drt in drts:
            drt.begin_step(step, optimizer)
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for drt in drts for p in trainable(drt)]
