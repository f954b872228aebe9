"""Resuming is bitwise equal to the straight run, from every checkpoint of a run with three switches."""

import copy
import json
import shutil
import time
from pathlib import Path

import forked
import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from safetensors.torch import load_file

from hf_drt import DRTTrainer, form_of

STEPS = 20


def in_form(folder, *args, **changes) -> DRTTrainer:
    """A trainer whose model and optimizer stay in the form of the last phase, so that all of both is compared."""
    return tiny.trainer(folder, *args, **{"drt_export": "native", **changes})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One run without interruption, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = in_form(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, trainer


@pytest.mark.sampled(6)
@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_is_bitwise_equal_from_every_checkpoint(straight, tmp_path, step):
    folder, expected = straight
    trainer = in_form(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_equal_runs(trainer, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"drt_factored_lr_scale": 2.0, "drt_frobenius_decay": True, "weight_decay": 0.1, "drt_rewarmup_steps": 5},
        {"drt_left_lr_scale": 4.0, "drt_right_lr_scale": 0.5, "drt_adapter_lr_scale": 2.0, "drt_moments": "project"},
        {"drt_left_lr_scale": 4.0, "drt_frobenius_decay": True, "weight_decay": 0.1, "drt_rewarmup_steps": 5},
        {"drt_moments": "reset", "drt_adapter_init": "principal"},
        {"drt_schedule": "decay(stages=3)", "lr_scheduler_type": "linear"},
        {"drt_schedule": "dense@0 factored@1ep", "max_steps": -1, "num_train_epochs": 2},
        {"max_grad_norm": 0.1, "drt_schedule": "factored@0 dense@lr<0.7 adapter@lr<0.3"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_resume_is_bitwise_equal_with_every_kind_of_setting(tmp_path, changes):
    expected = in_form(tmp_path / "a", save_strategy="steps", save_steps=3, **changes)
    expected.train()
    for step in range(3, expected.state.max_steps, 3):
        trainer = in_form(tmp_path / "b", **changes)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(trainer, expected)


def test_resume_works_from_sharded_weights(straight, tmp_path):
    folder, expected = straight
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(folder / "checkpoint-8", checkpoint)
    first = in_form(tmp_path / "out")
    first.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    (checkpoint / "model.safetensors").unlink()
    middle = in_form(tmp_path / "out2", save_strategy="steps", save_steps=4)
    save = middle.model.save_pretrained
    middle.model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": "20KB"})
    middle.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    sharded = tmp_path / "out2" / "checkpoint-12"
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    trainer = in_form(tmp_path / "out3")
    trainer.train(resume_from_checkpoint=str(sharded))
    assert_equal_runs(trainer, expected)


def test_resume_true_picks_the_last_checkpoint_within_the_save_limit(tmp_path):
    expected = in_form(tmp_path / "a")
    expected.train()
    first = in_form(tmp_path / "b", save_strategy="steps", save_steps=5, save_total_limit=2)
    first.train()
    assert {p.name for p in (tmp_path / "b").glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-20"}
    shutil.rmtree(tmp_path / "b" / "checkpoint-20")
    trainer = in_form(tmp_path / "b")
    trainer.train(resume_from_checkpoint=True)
    assert_equal_runs(trainer, expected)


def test_one_trainer_can_train_and_then_resume_an_earlier_checkpoint(tmp_path):
    trainer = in_form(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    expected = copy.deepcopy(trainer.model.state_dict())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(expected[n], p) for n, p in trainer.model.state_dict().items())


def test_a_boundary_step_is_not_done_twice(straight, tmp_path):
    """checkpoint-12 is saved at the end of phase 1; resumed, the model is still in its form and switches once."""
    folder, _ = straight
    assert json.loads((folder / "checkpoint-12" / "drt_state.json").read_text())["phase"] == 1
    trainer = in_form(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    switches = [row["drt_phase"] for row in trainer.state.log_history if "drt_switch_seconds" in row]
    assert switches == [0, 1, 2, 3]  # two of them from the straight run's history


def test_phase_times_of_a_resumed_run_add_up(straight, tmp_path):
    folder, _ = straight
    trainer = in_form(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    steps = [row["drt_phase_steps"] for row in trainer.state.log_history if "drt_phase_steps" in row]
    assert steps == [6, 6, 4, 4]


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import conftest, tiny, torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        import time
        Path(sys.argv[1], "at").write_text(str(state.global_step))
        time.sleep(0.2)
trainer = tiny.trainer(sys.argv[1], drt_export="native", save_strategy="steps", save_steps=4)
trainer.add_callback(Slow())
trainer.train()
"""


@pytest.mark.parametrize("kill_at", [6, 14])
def test_resume_after_kill_9_between_two_saves(straight, tmp_path, kill_at):
    _, expected = straight
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    child = forked.start("-c", code, tmp_path)
    deadline = time.monotonic() + 120
    at = tmp_path / "at"
    while int((at.read_text() if at.exists() else "") or 0) < kill_at:
        assert child.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    trainer = in_form(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_equal_runs(trainer, expected)


def test_load_best_model_at_end_from_a_checkpoint_of_another_phase(tmp_path):
    class FirstIsBest(DRTTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs) | {"eval_score": -float(self.state.global_step)}
            return metrics

    trainer = in_form(
        tmp_path, cls=FirstIsBest, save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert {type(form_of(m)).__name__ for m in map(trainer.model.get_submodule, trainer.drt.targets)} == {"Factored"}
    stored = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
