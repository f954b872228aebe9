"""A train() that fails before its first update leaves model and trainer as they were, and the next one trains right."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from hf_drt import CheckpointError, DRTConfig, DRTTrainer, DynamicRank

PLAN = "factored@0 dense@4 adapter@8"
PLANS = [PLAN, "adapter@0", "dense@0 adapter@6"]


class Unknown(torch.optim.AdamW):
    """An optimizer that needs a closure."""

    def step(self, closure):
        return super().step(closure)


class Fails(DRTTrainer):
    """Fails at one place of the preparation, once."""

    where: str | None = None

    def fail(self, where: str) -> None:
        if self.where == where:
            self.where = None
            raise RuntimeError(f"failed in {where}")

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self.fail("optimizer")
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if optimizer is None or optimizer is self.optimizer:  # not the simulation of its curve
            self.fail("scheduler")
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.fail("state")
        return super()._load_optimizer_and_scheduler(checkpoint)


def snapshot(model: nn.Module) -> tuple[dict, dict, dict]:
    modules = dict(model.named_modules())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return modules, values, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_as_it_was(model: nn.Module, before: tuple[dict, dict, dict]) -> None:
    modules, values, flags = snapshot(model)
    assert modules == before[0]  # the very layers
    assert values.keys() == before[1].keys()
    assert all(torch.equal(values[name], before[1][name]) for name in values)
    assert flags == before[2]
    assert not hasattr(model.config, "quantization_config") or any("U" in name or "lora" in name for name in values)


def assert_same_weights(trainer, other) -> None:
    state, expected = trainer.model.state_dict(), other.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("init", ["zero", "principal"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("where", ["optimizer", "scheduler"])
def test_the_next_attempt_trains_what_the_first_would_have(tmp_path, plan, where, init):
    settings = {"max_steps": 12, "drt_schedule": plan, "drt_adapter_init": init}
    trainer = tiny.trainer(tmp_path, cls=Fails, **settings)
    before = snapshot(trainer.model)
    trainer.where = where
    with pytest.raises(RuntimeError, match=f"failed in {where}"):
        trainer.train()
    assert_as_it_was(trainer.model, before)
    assert trainer.optimizer is trainer.lr_scheduler is None
    trainer.train()
    expected = tiny.trainer(tmp_path / "b", **settings)
    expected.train()
    assert_same_weights(trainer, expected)


def test_a_refused_optimizer_leaves_the_model_to_a_plain_trainer(tmp_path):
    class Refused(DRTTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = Unknown(self.model.parameters(), lr=3e-3)
            self.drt.install(self.optimizer)
            return self.optimizer

    model = tiny.llama(attention_dropout=0.1)
    with pytest.raises(ValueError, match="Unknown cannot follow a change of form"):
        tiny.trainer(tmp_path, model, cls=Refused, drt_schedule=PLAN, max_steps=12).train()
    trainer = tiny.trainer(tmp_path, model, cls=Trainer, drt_schedule=None, max_steps=12)
    trainer.train()
    expected = tiny.trainer(tmp_path, cls=Trainer, drt_schedule=None, max_steps=12)
    expected.train()
    assert_same_weights(trainer, expected)


def test_an_optimizer_that_was_passed_gets_its_groups_and_parameters_back(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    args = tiny.arguments(tmp_path, drt_schedule=PLAN, max_steps=12, drt_factored_lr_scale=2.0)
    trainer = Fails(model=model, args=args, train_dataset=tiny.dataset(), optimizers=(optimizer, None))
    trainer.where = "scheduler"
    with pytest.raises(RuntimeError, match="failed in scheduler"):
        trainer.train()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert {id(p) for p in model.parameters()} == {key for group in groups for key in group}


def test_a_model_in_low_rank_form_comes_back_in_that_form(tmp_path):
    model = tiny.llama(attention_dropout=0.1)
    DynamicRank(model, DRTConfig(schedule="adapter@0", rank_multiple=4), max_steps=1).apply(0)
    trainer = tiny.trainer(tmp_path, model, cls=Fails, drt_schedule=PLAN, max_steps=12)
    before = snapshot(model)
    trainer.where = "scheduler"
    with pytest.raises(RuntimeError, match="failed in scheduler"):
        trainer.train()
    assert_as_it_was(model, before)


class LoadsInPart(Fails):
    """Its way of loading fails before the first weight, or after all of them."""

    def _load_from_checkpoint(self, folder, model=None):
        self.fail("before the weights")
        super()._load_from_checkpoint(folder, model)
        self.fail("after the weights")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["before the weights", "after the weights", "state"])
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resume_that_fails_leaves_the_layers_or_what_the_checkpoint_holds(tmp_path, step, where):
    settings = {"max_steps": 12, "drt_schedule": PLAN, "save_strategy": "steps", "save_steps": 3}
    expected = tiny.trainer(tmp_path / "a", **settings)
    expected.train()
    trainer = tiny.trainer(tmp_path / "b", cls=LoadsInPart, **settings)
    before = snapshot(trainer.model)
    checkpoint = tmp_path / "a" / f"checkpoint-{step}"
    trainer.where = where
    with pytest.raises(RuntimeError, match=f"failed in {where}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    if where == "before the weights":
        assert_as_it_was(trainer.model, before)
    if where == "after the weights":
        assert snapshot(trainer.model)[0] == before[0]  # the very layers
    if where == "state":
        landed = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(p, landed[name]) for name, p in trainer.model.state_dict().items() if name in landed)
    with pytest.raises(CheckpointError, match="has no drt_state"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(trainer, expected)
