"""Settings that go by the learning rate, with an optimizer that computes its own."""

import copy
import math

import pytest
import tiny
import torch
import transformers as T
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DynamicRank

RULES = (
    {"rewarmup_steps": 2}, {"factored_lr_scale": 2.0}, {"adapter_lr_scale": 2.0}, {"frobenius_decay": True},
    {"left_lr_scale": 2.0}, {"right_lr_scale": 2.0},
)  # fmt: skip
PLAN = "factored@0 dense@3 adapter@5"
MESSAGE = (
    r"{}=\S+: this needs the learning rate of the optimizer's groups, but Adafactor with relative_step=True computes "
    r"its own .* Use Adafactor\(params, lr=1e-3, relative_step=False, scale_parameter=False\), or AdamW\. Leave"
)
ANCHOR = (
    r"'dense@lr<0\.5' begins at a share of the scheduler's peak learning rate, but Adafactor with relative_step=True "
    r"computes its own .* or give the boundary in % or steps\."
)
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))


def relative(model, **changes):
    return Adafactor((p for p in model.parameters() if p.requires_grad), **{"lr": None, **changes})


def controller(**settings):
    return DynamicRank(tiny.llama().eval(), DRTConfig(**{"schedule": PLAN, "rank": 4, **settings}), 8)


@rules
def test_a_loop_refuses_rules_that_a_relative_step_does_not_read(rule):
    drt = controller(**rule)
    modules = dict(drt.model.named_modules())
    message = MESSAGE.format(next(iter(rule)))
    optimizer = relative(drt.model)
    before = copy.deepcopy(optimizer.state_dict())
    for attempt in (drt.install, lambda o: drt.apply(0, o), lambda o: drt.begin_step(0, o)):
        with pytest.raises(ValueError, match=message):
            attempt(optimizer)
        assert dict(drt.model.named_modules()) == modules
        assert (drt.phase, optimizer.state_dict()) == (None, before)
    drt.apply(0)
    drt.begin_step(0, relative(drt.model, lr=1e-3, relative_step=False))


def test_a_group_of_another_model_may_have_a_relative_step():
    drt = controller(rewarmup_steps=2)
    drt.apply(0)
    own = {"params": [p for p in drt.model.parameters() if p.requires_grad], "relative_step": False, "lr": 1e-3}
    other = torch.nn.Linear(3, 3)
    optimizer = Adafactor([own, {"params": other.parameters()}], lr=None)
    for step in range(8):
        drt.begin_step(step, optimizer)
        (drt.model(**tiny.batch()).loss + other(torch.ones(3)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_without_these_rules_a_relative_step_trains_as_it_says():
    """Every update is that of an Adafactor of rate min(1e-2, 1 / sqrt(t)), t counted from a weight's beginning."""
    drt, other = controller(), controller()
    for each in (drt, other):
        each.apply(0)
    optimizer = relative(drt.model, scale_parameter=False)
    by_hand = relative(other.model, lr=1.0, relative_step=False, scale_parameter=False)
    began = {}
    for step in range(8):
        drt.begin_step(step, optimizer)
        other.begin_step(step, by_hand)
        for model, used in ((drt.model, optimizer), (other.model, by_hand)):
            model(**tiny.batch()).loss.backward()
            if used is optimizer:
                used.step()
        for p in other.model.parameters():
            began.setdefault(p, step)
        (group,) = by_hand.param_groups
        everything = group["params"]
        for p in everything:
            group["params"], group["lr"] = [p], min(1e-2, 1 / math.sqrt(step - began[p] + 1))
            by_hand.step()
        group["params"] = everything
        for model in (drt.model, other.model):
            model.zero_grad()
    weights = other.model.state_dict()
    assert all(torch.equal(p, weights[name]) for name, p in drt.model.state_dict().items())


def trainer(folder, given, **changes):
    model = tiny.llama()
    arguments = tiny.arguments(folder, **{"max_steps": 8, "drt_schedule": PLAN, **changes})
    if given == "passed":
        optimizer = relative(model)
        return DRTTrainer(
            model, arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, AdafactorSchedule(optimizer))
        )
    settings = {"lr": None} if given == "class" else {"params": model.parameters(), "relative_step": True}
    return DRTTrainer(model, arguments, train_dataset=tiny.dataset(), optimizer_cls_and_kwargs=(Adafactor, settings))


@rules
@pytest.mark.parametrize("given", ["passed", "class", "class and parameters"])
def test_a_trainer_refuses_them_when_it_is_made(tmp_path, given, rule):
    with pytest.raises(ValueError, match=MESSAGE.format(next(iter(rule)))):
        trainer(tmp_path, given, **{f"drt_{key}": value for key, value in rule.items()})


@pytest.mark.parametrize("given", ["passed", "class"])
def test_a_trainer_refuses_lr_anchors_when_it_is_made(tmp_path, given):
    with pytest.raises(ValueError, match=ANCHOR):
        trainer(tmp_path, given, drt_schedule="factored@0 dense@lr<0.5")


class Own(DRTTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = relative(self.model)
        return super().create_optimizer(model)


def test_an_overridden_create_optimizer_is_refused_before_the_first_update(tmp_path):
    late = tiny.trainer(tmp_path, cls=Own, drt_rewarmup_steps=2)
    with pytest.raises(ValueError, match=MESSAGE.format("rewarmup_steps")):
        late.train()
    assert late.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewarmup_steps": 2}, MESSAGE.format("rewarmup_steps")),
        ({"schedule": "factored@0 dense@lr<0.5"}, ANCHOR),
    ],
    ids=["rule", "anchor"],
)
def test_the_callback_refuses_them_before_it_changes_the_model(tmp_path, settings, message):
    model = tiny.llama()
    optimizer = relative(model)
    arguments = T.TrainingArguments(output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no")
    plain = T.Trainer(
        model, arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, AdafactorSchedule(optimizer)),
        callbacks=[DRTCallback(DRTConfig(**{"schedule": PLAN, "rank": 4, **settings}))],
    )  # fmt: skip
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        plain.train()
    assert dict(model.named_modules()) == modules


def test_a_relative_step_with_its_own_scheduler_trains_in_a_trainer(tmp_path):
    run = trainer(tmp_path, "passed")
    run.train()
    assert [row["drt_phase"] for row in run.state.log_history if "drt_switch_seconds" in row] == [0, 1, 2]
