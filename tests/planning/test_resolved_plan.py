"""A plan is resolved once, and handed on; for any schedule the model is looked through once."""

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_drt import Dense, DRTCallback, DRTConfig, DRTTrainer, DynamicRank, Run, Schedule, find_targets
from hf_drt.planning import LayersOf, ResolvedPlan, TargetLayers, resolved_plan
from hf_drt.schedule import PRESETS
from hf_drt.targets import selection
from hf_drt.trainer import unused

WRITTEN = ("factored@0 dense@40% adapter@80%", "dense@0", "factored:0.125@0 dense@budget", "dense@0 factored@lr<0.5")
SCHEDULES = (*PRESETS, *WRITTEN)


def settings(schedule):
    """Ranks that tiny layers allow."""
    rank = {"rank": 3} if schedule == "adaptive" else {"rank_multiple": 1}
    return {"schedule": schedule} | (rank if schedule != "dense@0" else {})


@pytest.fixture
def looks(monkeypatch):
    """Counts how often a model is looked through."""
    counted = []
    real = selection._Surroundings.of.__func__

    def of(cls, model, entries):
        counted.append(model)
        return real(cls, model, entries)

    monkeypatch.setattr(selection._Surroundings, "of", classmethod(of))
    return counted


def arguments(folder, schedule, **changes):
    own = {f"drt_{name}": value for name, value in {"rank_multiple": 8, **settings(schedule)}.items()}
    return tiny.arguments(folder, max_steps=32, lr_scheduler_type="linear", **own, **changes)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_a_trainer_looks_once_from_its_construction_to_the_first_step(tmp_path, looks, schedule, start, monkeypatch):
    class Done(Exception):
        pass

    def step(self, *args, **kwargs):
        raise Done

    monkeypatch.setattr(Trainer, "training_step", step)
    start = {"drt_start": start} if Schedule.parse(schedule).writes_lowrank else {}
    trainer = DRTTrainer(tiny.llama(), arguments(tmp_path, schedule, **start), train_dataset=tiny.dataset())
    with pytest.raises(Done):
        trainer.train()
    assert looks == [trainer.model]
    assert trainer.drt.resolved.plan == trainer.drt.plan


@pytest.mark.parametrize("schedule", ["auto_late", "paper"])
def test_a_callback_in_a_plain_trainer_looks_once(tmp_path, looks, schedule):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=30, disable_tqdm=True)
    callback = DRTCallback(DRTConfig(schedule=schedule, rank_multiple=1))
    trainer = Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback])
    trainer.train()
    assert len(looks) == 1


def test_a_model_made_by_model_init_is_looked_through_too(tmp_path, looks):
    trainer = DRTTrainer(
        args=arguments(tmp_path, "auto"), model_init=lambda: tiny.llama(), train_dataset=tiny.dataset()
    )
    trainer.train()
    assert len(looks) == 2
    assert looks[0] is not looks[1]  # the Trainer makes one at its construction, and another for the run


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_by_hand_a_model_is_looked_through_once(looks, schedule):
    model, config = tiny.llama(), DRTConfig(**settings(schedule))
    if config.parsed.uses_lr and schedule != "paper":
        resolved = resolved_plan(config, Run(32, lr=lambda: [1 - step / 32 for step in range(32)]), model)
        drt = DynamicRank(model, config, plan=resolved)
    else:
        drt = DynamicRank(model, config, max_steps=32)
    assert len(looks) == 1
    drt.apply(0)
    assert len(looks) == 1


# ---- what it holds


def test_it_holds_phases_layers_forms_and_cost():
    model, config = tiny.llama(), DRTConfig(schedule="factored@0 dense@25% adapter:4@75%", rank=8)
    resolved = resolved_plan(config, Run(20), model)
    assert [(p.start, p.kind) for p in resolved.plan.phases] == [(0, "factored"), (5, "dense"), (15, "adapter")]
    found = find_targets(model).targets
    assert resolved.targets.shapes == {name: tuple(layer.weight.shape) for name, layer in found.items()}
    ranks = [{getattr(form, "rank", None) for form in forms.values()} for forms in resolved.forms_by_phase]
    assert ranks == [{8}, {None}, {4}]
    size = {name: out * into for name, (out, into) in resolved.targets.shapes.items()}
    low = [
        sum(r * sum(shape) for shape in resolved.targets.shapes.values()) / sum(size.values()) for r in (8, 4)
    ]  # of the multiply-adds of W: r (m + n) / (m n)
    assert resolved.cost.flops == pytest.approx((5 * low[0] + 10 + 5 * (2 / 3 + low[1])) / 20)
    assert (resolved.lowrank, resolved.budget, resolved.trigger) == ("factored", None, None)


def test_it_does_not_change():
    resolved = resolved_plan(DRTConfig(schedule="auto", rank_multiple=1), Run(100), tiny.llama())
    with pytest.raises(AttributeError, match="cannot assign to field 'plan'"):
        resolved.plan = None
    name = next(iter(resolved.targets.shapes))
    for held in (resolved.targets.shapes, resolved.targets.copies, *resolved.forms_by_phase):
        for change in (
            lambda held: held.__setitem__(name, Dense()), lambda held: held.pop(name), lambda held: held.update({}),
            lambda held: held.clear(), lambda held: held.setdefault("a", 1), lambda held: held.__delitem__(name),
        ):  # fmt: skip
            with pytest.raises(TypeError, match=r"what a plan was resolved to does not change\. Make a copy: dict"):
                change(held)
    for twin in (copy.deepcopy(resolved), pickle.loads(pickle.dumps(resolved))):
        assert twin == resolved


def test_a_controller_takes_it_and_hands_it_on():
    model, config = tiny.llama(), DRTConfig(schedule="auto", rank_multiple=1)
    resolved = resolved_plan(config, Run(100), model)
    drt = DynamicRank(model, config, plan=resolved)
    assert drt.resolved is resolved
    by_text = DynamicRank(tiny.llama(), config, max_steps=100)
    assert by_text.resolved == resolved
    assert drt.cost() == resolved.cost
    assert drt.forms(0) == resolved.forms_by_phase[0]
    by_plan = DynamicRank(tiny.llama(), config, plan=resolved.plan)
    assert by_plan.resolved.forms_by_phase == resolved.forms_by_phase


@pytest.mark.parametrize("changes", [{"seed": 3}, {"rank_multiple": 2}])
def test_a_plan_of_other_settings_is_refused(changes):
    resolved = resolved_plan(DRTConfig(schedule="auto", rank_multiple=1), Run(100), tiny.llama())
    with pytest.raises(ValueError, match=r"the plan 'factored:.*' was resolved under other settings\. Pass the sett"):
        DynamicRank(tiny.llama(), DRTConfig(**{"schedule": "auto", "rank_multiple": 1} | changes), plan=resolved)
    trigger = Schedule.parse("adaptive").trigger
    with pytest.raises(ValueError, match=r"was resolved with a trigger of its own"):
        DynamicRank(tiny.llama(), resolved.config, plan=resolved, trigger=trigger)
    with pytest.raises(ValueError, match=r"max_steps is 7, but the plan is of 100 update steps"):
        DynamicRank(tiny.llama(), resolved.config, 7, plan=resolved)


@pytest.mark.parametrize(
    "made", [lambda config, model: resolved_plan(config, Run(10), model), lambda config, model: unused(model, config)]
)
def test_a_plan_needs_a_schedule(made):
    with pytest.raises(ValueError, match=r"there is no schedule, of which a plan is made\. Set schedule, e\.g\. sch"):
        made(DRTConfig(), tiny.llama())


def test_windows_extend_a_copy():
    config = DRTConfig(schedule="adaptive(signal=loss)", rank_multiple=1, budget=0.9)
    drt = DynamicRank(tiny.llama(), config, max_steps=40)
    before = drt.resolved
    for step in range(40):
        drt.apply(step)
        drt.observe(step + 1, 1.0)
    assert len(drt.plan) > 1
    assert drt.initial is before
    assert len(before.plan) == 1
    assert len(drt.resolved.forms_by_phase) == len(drt.plan)
    assert drt.cost().flops <= 0.9
    assert drt.resolved == ResolvedPlan.of(drt.plan, before.targets, config, trigger=before.trigger,
                                           lowrank="factored", budget=before.budget)  # fmt: skip


# ---- looking anew where the model is another


def test_layers_are_looked_for_again_where_the_model_has_changed(looks):
    layers, model, config = LayersOf(), tiny.llama(), DRTConfig(schedule="fixed")
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    first = layers(model, config)
    model.train()
    assert layers(model, DRTConfig(schedule="paper", rank=3)) is first

    def frozen():
        layer.weight.requires_grad_(False)

    def hooked():
        layer.weight.requires_grad_(True)
        layer.register_forward_hook(lambda *args: None)

    def replaced():
        model.get_submodule("model.layers.0.mlp").up_proj = nn.Linear(32, 64, bias=False)

    def tied():
        model.get_submodule("model.layers.1.mlp").up_proj.weight = model.get_submodule(name).weight

    for change, stays in ((frozen, False), (hooked, False), (replaced, True), (tied, False)):
        change()
        found = layers(model, config)
        assert found == TargetLayers.of(model, config)
        assert (name in found.shapes) == stays
        assert layers(model, config) is found
    chosen = layers(model, DRTConfig(schedule="fixed", include=["mlp"]))
    assert all("mlp" in name for name in chosen.shapes)
    assert layers(tiny.llama(), config) == first
    assert isinstance(first.shapes, dict)


def test_a_layer_that_is_frozen_after_the_trainer_was_made_stays_dense(tmp_path):
    model = tiny.llama()
    trainer = DRTTrainer(model, arguments(tmp_path, "fixed"), train_dataset=tiny.dataset())
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = weight.clone()
    trainer.train()
    assert trainer.drt.skipped["model.layers.0.mlp.up_proj"] == "frozen"
    assert torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
