"""The preset adaptive in the Trainer: windows begin, are logged, saved, and made again by a resumed run."""

import json

import pytest
import tiny
import torch
from transformers import Trainer

from hf_drt import DRTCallback, DRTConfig, DynamicRank

ADAPTIVE = "adaptive(signal=loss,plateau=90,window=15,every=10)"  # a loss that falls by less than 90 % "stands still"
STEPS = 20


def adaptive(folder, **changes):
    return tiny.trainer(folder, **{"drt_schedule": ADAPTIVE, "drt_budget": 0.8, "drt_rank": 4} | changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One run without interruption, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = adaptive(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, trainer


def test_windows_begin_when_the_loss_stands_still(straight):
    plan = straight[1].drt.plan
    # Checks every 2 steps; the first loss to compare with is that of steps 3 and 4; a window lasts 3 steps. After it
    # the first check compares with nothing, the second is the next window's start.
    assert str(plan).startswith("factored@0 dense@4 factored@7 dense@10 factored@13")
    assert straight[1].drt.cost().flops <= 0.8


def test_the_loss_is_the_mean_of_the_micro_batches(straight, tmp_path):
    losses = []

    class Watched(type(straight[1])):
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs).item())
            return torch.tensor(losses[-1])

    trainer = tiny.trainer(tmp_path, cls=Watched, drt_schedule=ADAPTIVE, drt_budget=0.8, drt_rank=4)
    trainer.train()
    of_updates = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]  # accumulation 2, each already halved
    first, second = trainer.drt.windows.trace[:2]
    assert first["loss"] == pytest.approx(sum(of_updates[:2]) / 2)
    assert second["loss"] == pytest.approx(sum(of_updates[2:4]) / 2)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_resumed_run_makes_the_same_windows(straight, tmp_path, step):
    folder, expected = straight
    trainer = adaptive(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert trainer.drt.plan == expected.drt.plan
    assert trainer.drt.windows.trace == expected.drt.windows.trace
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.model.state_dict().items())


def test_every_check_is_logged_and_in_the_checkpoint(straight):
    folder, trainer = straight
    rows = [row for row in trainer.state.log_history if "drt_window" in row]
    trace = trainer.drt.windows.trace
    assert [row["step"] for row in rows] == [check["step"] for check in trace]
    assert [bool(row["drt_window"]) for row in rows] == [check["decision"] in ("rank", "loss") for check in trace]
    state = json.loads((folder / f"checkpoint-{STEPS}" / "drt_state.json").read_text())
    assert state["windows"]["trace"] == trace


def test_phases_are_measured_like_planned_ones(straight):
    plan = straight[1].drt.plan
    steps = [row["drt_phase_steps"] for row in straight[1].state.log_history if "drt_phase_steps" in row]
    assert steps == [plan.end_of(i) - phase.start for i, phase in enumerate(plan.phases)]


def test_the_best_model_of_an_earlier_phase_is_loaded(tmp_path):
    trainer = adaptive(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        drt_export="native",
        metric_for_best_model="loss", greater_is_better=True,  # random labels: the loss is highest at first
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.drt.phase == 0
    assert len(trainer.drt.plan) > 2  # what was done is not forgotten
    assert trainer.drt.windows.trace[-1]["step"] > 2


def test_a_finished_run_resumed_from_its_middle_makes_its_windows_again(tmp_path):
    trainer = adaptive(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    plan, trace = trainer.drt.plan, trainer.drt.windows.trace
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (trainer.drt.plan, trainer.drt.windows.trace) == (plan, trace)


def test_a_second_run_has_windows_of_its_own(straight, tmp_path):
    trainer = adaptive(tmp_path)
    trainer.train()
    first = trainer.drt.windows.trace
    trainer.train()
    assert trainer.drt.windows.trace is not first
    assert trainer.drt.windows.trace[0]["step"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"drt_schedule": "adaptive(signal=loss,plateau=90,window=20,every=10)"},
            r"schedule is .*window=20",
        ),
        ({"drt_budget": 0.7}, r"budget is 0\.7 here, and 0\.8 in the state"),
        ({"max_steps": 30}, r"the plan has changed"),
    ],
)
def test_a_checkpoint_of_other_windows_is_refused(straight, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        adaptive(tmp_path, **changes).train(resume_from_checkpoint=str(straight[0] / "checkpoint-12"))


def test_a_callback_alone_sees_ranks_but_no_losses(tmp_path):
    args = tiny.arguments(tmp_path, drt_schedule=None)
    with pytest.raises(ValueError, match=r"does not see the loss.* Use DRTTrainer, or adaptive\(signal=rank\)"):
        Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[DRTCallback("adaptive")])
    callback = DRTCallback(DRTConfig(schedule="adaptive(signal=rank,drop=0.001,every=10)", rank=4, budget=0.8))
    Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback]).train()
    assert any(check["decision"] == "rank" for check in callback.controller.windows.trace)


def test_a_callback_alone_cannot_load_the_best_model(tmp_path):
    args = tiny.arguments(
        tmp_path, drt_schedule=None, save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True,
    )  # fmt: skip
    callback, data = DRTCallback("adaptive(signal=rank)"), tiny.dataset()
    with pytest.raises(ValueError, match=r"loads weights of one phase into the structure of another"):
        Trainer(tiny.llama(), args, train_dataset=data, eval_dataset=data, callbacks=[callback])


def test_an_adapter_is_not_promised_of_a_run_that_may_end_in_full_rank(tmp_path):
    trainer = adaptive(tmp_path, drt_start="pretrained", drt_rank=2, drt_budget=0.9, drt_export="adapter")
    with pytest.raises(ValueError, match=r"a full-rank window of the preset adaptive may last to the end"):
        trainer.train()


def test_the_budget_in_force_without_one():
    config = DRTConfig(schedule="adaptive", rank=4)
    assert DynamicRank(tiny.llama(), config, max_steps=50).windows.limit == 0.4
    config = DRTConfig(schedule="adaptive", rank=4, start="pretrained")
    assert DynamicRank(tiny.llama(), config, max_steps=50).windows.limit == 0.9
