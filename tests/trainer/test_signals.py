"""SIGTERM, as a cluster sends it before it takes a machine away, and SIGKILL in the middle of a switch."""

import os
import signal
import time
from pathlib import Path

import forked
import pytest
import tiny
from equal_runs import assert_equal_runs
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_drt import DRTCallback, DRTTrainer
from hf_drt.targets import Places

SAVING = {"save_strategy": "steps", "save_steps": 5}
FIRST_IS_BEST = {
    "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "score",
    "greater_is_better": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run without interruption; switches at steps 6, 12 and 16, epochs of 8 steps, dropout."""
    trainer = tiny.trainer(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def _handler():
    """A run that a test breaks off leaves its signal handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    """SIGTERM to this process, and the end of the wait after which transformers asks for a checkpoint."""
    manager = signal.getsignal(signal.SIGTERM).__self__
    manager.kill_wait = 0
    os.kill(os.getpid(), signal.SIGTERM)
    while not manager.is_checkpoint_requested:
        time.sleep(0.001)


class Terminate(TrainerCallback):
    def __init__(self, event: str, step: int):
        self.step, self.sent = step, False
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.sent:
            self.sent = True
            terminate()


def drt_rows(trainer) -> list[tuple]:
    """What the log says of switches and phases, but for times."""
    keys = ("step", "drt_phase", "drt_trainable_parameters", "drt_truncation_error", "drt_phase_steps")
    return [tuple(row.get(key) for key in keys) for row in trainer.state.log_history if "drt_phase" in row]


def assert_goes_on(folder, expected, **settings) -> None:
    resumed = tiny.trainer(folder, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    assert_equal_runs(resumed, expected)
    assert drt_rows(resumed) == drt_rows(expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("on_pre_optimizer_step", 3),
        ("on_pre_optimizer_step", 12),  # in the step of a switch
        ("on_step_begin", 6),
        ("on_step_begin", 5),  # in the last step of a phase
        ("on_step_begin", 7),  # in the last step of an epoch
        ("on_step_begin", 8),  # in the first
        ("on_save", 10),
    ],
)
def test_a_jit_checkpoint_goes_on_bitwise_whenever_the_signal_comes(straight, tmp_path, event, step):
    trainer = tiny.trainer(tmp_path, enable_jit_checkpoint=True, **SAVING)
    trainer.add_callback(Terminate(event, step))
    trainer.train()
    assert trainer.state.global_step == step + 1
    assert (tmp_path / f"checkpoint-{step + 1}" / "trainer_state.json").exists()
    assert_goes_on(tmp_path, straight)


def test_a_jit_checkpoint_asked_for_in_the_middle_of_a_switch_goes_on_bitwise(straight, tmp_path, monkeypatch):
    """Between the model, which has its new layers, and the optimizer, which has not."""
    trainer = tiny.trainer(tmp_path, enable_jit_checkpoint=True)
    put = Places.put

    def put_and_terminate(*args):
        put(*args)
        if trainer.state.global_step == 16:
            terminate()

    monkeypatch.setattr(Places, "put", put_and_terminate)
    trainer.train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-17"]
    assert_goes_on(tmp_path, straight)


class FirstIsBest(DRTTrainer):
    """Every evaluation is worse than the one before. Notes which checkpoints there are as each begins."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def evaluate(self, *args, **kwargs):
        self.seen.append(sorted(path.parent.name for path in Path(self.args.output_dir).glob("*/trainer_state.json")))
        return super().evaluate(*args, **kwargs) | {"eval_score": -float(self.state.global_step)}


def test_a_jit_checkpoint_outlives_a_limit_of_one_that_keeps_the_best(tmp_path):
    """An evaluation is due in its step: the checkpoint is there before, and written again afterwards."""
    settings = {**SAVING, **FIRST_IS_BEST, "save_total_limit": 1, "cls": FirstIsBest}
    expected = tiny.trainer(tmp_path / "straight", **settings | {"load_best_model_at_end": False})
    expected.train()
    trainer = tiny.trainer(tmp_path / "run", enable_jit_checkpoint=True, **settings)
    trainer.add_callback(Terminate("on_step_begin", 9))
    trainer.train()
    assert trainer.seen == [[], ["checkpoint-10", "checkpoint-5"]]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    resumed = tiny.trainer(tmp_path / "run", **settings | {"load_best_model_at_end": False})
    resumed.train(resume_from_checkpoint=True)
    assert_equal_runs(resumed, expected)
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-5")


@pytest.mark.parametrize(("step", "saves"), [(3, 1), (7, 2)], ids=["in an epoch", "at its end"])
def test_a_jit_checkpoint_where_evaluations_and_checkpoints_are_per_epoch(tmp_path, monkeypatch, step, saves):
    """The Trainer acts as at the end of an epoch wherever training stops."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "cls": FirstIsBest}
    expected = tiny.trainer(tmp_path / "straight", **settings)
    expected.train()
    made = []
    save = DRTTrainer._save_checkpoint
    monkeypatch.setattr(DRTTrainer, "_save_checkpoint", lambda *args, **kwargs: (made.append(1), save(*args, **kwargs)))
    trainer = tiny.trainer(tmp_path / "run", enable_jit_checkpoint=True, **settings)
    trainer.add_callback(Terminate("on_step_begin", step))
    trainer.train()
    monkeypatch.undo()
    assert trainer.state.global_step == step + 1
    assert (len(made), len(trainer.seen)) == (saves, saves - 1)
    assert_goes_on(tmp_path / "run", expected, **settings)


def test_a_run_without_a_signal_is_that_without_jit_checkpoints(straight, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = tiny.trainer(tmp_path, enable_jit_checkpoint=True)
    assert signal.getsignal(signal.SIGTERM) != before
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert_equal_runs(trainer, straight)
    assert list(tmp_path.iterdir()) == []


def test_a_callback_on_its_own_refuses_jit_checkpoints(tmp_path):
    settings = {"output_dir": str(tmp_path), "max_steps": 4, "report_to": [], "enable_jit_checkpoint": True}
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint saves without an event .* Use DRTTrainer"):
        Trainer(
            tiny.llama(), TrainingArguments(**settings), train_dataset=tiny.dataset(), callbacks=[DRTCallback("fixed")]
        )


# ---- signals that end the process

CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest, tiny, torch
torch.set_num_threads(1)
from transformers import TrainerCallback
import hf_drt.controller as controller
import hf_drt.transition.change as transition
from hf_drt.targets import Places
folder, place, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
trainer = tiny.trainer(folder, save_strategy="steps", save_steps=5)

def ends(function, calls=1, after=True, number=signal.SIGKILL):
    # The function, with a signal before or after one of its calls in the step.
    def wrapped(*args, **kwargs):
        nonlocal calls
        here = trainer.state.global_step == step
        calls -= here
        if here and calls == 0 and not after:
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if here and calls == 0 and after:
            os.kill(os.getpid(), number)
        return result
    return wrapped

class AtStepEnd(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        pass

match place:
    case "between steps":
        AtStepEnd.on_step_end = ends(AtStepEnd.on_step_end, number=signal.SIGTERM)
        trainer.add_callback(AtStepEnd())
    case "between two layers":
        transition.prepare = ends(transition.prepare, calls=5)
    case "before the model":
        Places.put = ends(Places.put, after=False)
    case "between model and optimizer":
        Places.put = ends(Places.put)
    case "after the optimizer":
        apply = controller.DynamicRank.apply
        controller.DynamicRank.apply = ends(apply)
trainer.train()
"""


def ended_by(folder: Path, place: str, step: int) -> int:
    """The run in a process of its own, and the signal that ended it."""
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    return -forked.python("-c", code, folder, place, step).returncode


def test_a_plain_sigterm_ends_the_process_and_the_run_goes_on_from_the_last_checkpoint(straight, tmp_path):
    """Without enable_jit_checkpoint nothing handles the signal."""
    assert ended_by(tmp_path, "between steps", 13) == signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert_goes_on(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 12, 16])
@pytest.mark.parametrize(
    "place", ["between two layers", "before the model", "between model and optimizer", "after the optimizer"]
)
def test_kill_9_inside_a_switch(straight, tmp_path, place, step):
    assert ended_by(tmp_path, place, step) == signal.SIGKILL
    assert len(list(tmp_path.glob("checkpoint-*"))) == step // 5
    assert_goes_on(tmp_path, straight)
