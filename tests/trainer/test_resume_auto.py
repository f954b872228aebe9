"""train(resume_from_checkpoint="auto"): from the last complete checkpoint, and anew while there is none."""

import logging
import shutil

import pytest
import tiny
from equal_runs import assert_equal_runs
from transformers import TrainerCallback
from writers import around_writes, cut_short

from hf_drt import CheckpointError, DRTConfig, run
from hf_drt.trainer.saving import MARK

SETTINGS = {
    "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1,
    "drt_schedule": "factored@0 dense@4",
}  # fmt: skip


class Beginnings(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def trainer_of(folder, **changes):
    trainer = tiny.trainer(folder, **SETTINGS | changes)
    trainer.add_callback(trainer_of.begins)
    return trainer


@pytest.fixture(autouse=True)
def begins():
    trainer_of.begins = Beginnings()
    return trainer_of.begins.steps


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = tiny.trainer(folder, **SETTINGS)
    trainer.train()
    return folder, trainer


def copied(straight, tmp_path, *steps: int) -> None:
    for step in steps:
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")


def test_without_a_checkpoint_a_new_run_begins(straight, tmp_path, begins, caplog):
    caplog.set_level(logging.INFO, "hf_drt")
    trainer = trainer_of(tmp_path / "new")
    trainer.train(resume_from_checkpoint="auto")
    assert begins == [0]
    assert_equal_runs(trainer, straight[1])
    assert "holds no checkpoint yet: training begins at update step 0" in caplog.text


def test_with_checkpoints_the_last_complete_one_goes_on(straight, tmp_path, begins):
    copied(straight, tmp_path, 3, 6)
    cut_short(tmp_path / "checkpoint-6" / "optimizer.pt")
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert begins == [3]
    assert_equal_runs(trainer, straight[1])


def test_the_remains_of_a_kill_within_the_first_save_are_no_checkpoint(straight, tmp_path, begins):
    def dies(path, write):
        if path.name == "optimizer.pt":
            raise KeyboardInterrupt
        write()

    with around_writes("checkpoint-3", dies), pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path).train()
    (tmp_path / "checkpoint-3").mkdir(exist_ok=True)  # what a kill, which cleans nothing up, leaves
    (tmp_path / "checkpoint-3" / MARK).touch()
    (tmp_path / "checkpoint-6").mkdir()
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert begins == [0, 0]
    assert_equal_runs(trainer, straight[1])


def test_where_all_checkpoints_are_damaged_it_does_not_begin_anew(straight, tmp_path, begins):
    copied(straight, tmp_path, 3, 6)
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. .*optimizer\.pt is missing"):
        trainer_of(tmp_path).train(resume_from_checkpoint="auto")
    assert begins == []


def test_without_dynamic_rank_it_means_the_same(tmp_path, begins):
    off = {"drt_schedule": None}
    trainer_of(tmp_path, max_steps=4, **off).train(resume_from_checkpoint="auto")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"global_')
    again = trainer_of(tmp_path, max_steps=4, save_strategy="no", **off)
    again.train(resume_from_checkpoint="auto")
    assert begins == [0, 4]  # the Trainer saves at the last step too


def test_true_without_a_checkpoint_is_refused_as_before(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. It has none at all"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


# ---- under torchrun, and as a default


def test_a_restarted_job_that_begins_anew_over_its_checkpoints_says_so(straight, tmp_path, monkeypatch, caplog, begins):
    copied(straight, tmp_path, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    trainer_of(tmp_path, max_steps=1, drt_schedule="factored@0").train()
    assert "restarted" not in caplog.text
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    trainer_of(tmp_path, max_steps=1, drt_schedule="factored@0").train()
    assert "restarted this job (2 times so far), and training begins anew" in caplog.text
    assert "train(resume_from_checkpoint='auto')" in caplog.text


@pytest.mark.parametrize(("given", "step"), [(None, 3), (True, 3), (False, 3)])
def test_the_flag_of_hf_drt_run_is_the_default_of_train(straight, tmp_path, begins, given, step):
    copied(straight, tmp_path, 3)
    settings = {"drt_schedule": None}
    config = DRTConfig(schedule=SETTINGS["drt_schedule"], rank_multiple=4)
    with run.dynamic_rank_trainers(config, resume="auto"):
        trainer_of(tmp_path, **settings).train(resume_from_checkpoint=given)
    assert begins == [step]
    with run.dynamic_rank_trainers(config):
        trainer_of(tmp_path, max_steps=8, save_strategy="no", **settings).train()
    assert begins == [step, 0]


def test_the_flag_stands_in_the_help_and_has_two_values(capsys):
    *_, flags = run.read_command([__file__, "--drt_schedule", "paper", "--drt_resume", "auto", "--mine"])
    assert flags.drt_resume == "auto"
    *_, rest, flags = run.read_command([__file__, "--drt_schedule", "paper", "--mine"])
    assert (flags.drt_resume, rest) == ("never", ["--mine"])
    with pytest.raises(SystemExit):
        run.read_command([__file__, "--drt_schedule", "paper", "--drt_resume", "always"])
    assert "invalid choice: 'always'" in capsys.readouterr().err
