"""A kill or a full disk at every stage of writing a checkpoint: one that was complete stays, and goes on bitwise."""

import contextlib
import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import forked
import pytest
import tiny
import torch
import transformers.trainer
from equal_runs import assert_equal_runs
from transformers.trainer_utils import rotate_checkpoints
from writers import FILES, around_writes, cut_short

from hf_drt import CheckpointError
from hf_drt.trainer.saving import MARK

# Switches at steps 5 and 8: the checkpoint of step 8 is in the second phase, and a run from step 4 comes through both.
SETTINGS = {
    "max_steps": 10, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 4,
    "drt_schedule": "factored@0 dense@5 adapter@8", "logging_strategy": "no",
}  # fmt: skip
STAGES = [(place, file) for file in FILES for place in ("before", "within")] + [("after", "trainer_state.json")]


def trainer_of(folder: Path, seed: int = 0, **changes):
    """A run; of other weights, in which every file differs, with another seed."""
    model = tiny.llama(attention_dropout=0.1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return tiny.trainer(folder, model, **SETTINGS | changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, trainer


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run with other weights: what an earlier, abandoned run has left in the folder."""
    folder = tmp_path_factory.mktemp("other")
    trainer = trainer_of(folder, seed=1)
    trainer.train()
    return folder, trainer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(folder: Path) -> None:
    """What a kill before the last file leaves of a checkpoint."""
    (folder / "trainer_state.json").unlink()
    (folder / MARK).touch()


def goes_on(folder: Path, **changes):
    trainer = trainer_of(folder, seed=2, **changes)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def photographed(monkeypatch, folder: Path, photos: Path, **settings) -> None:
    """Train, and copy the folder at every stage of writing checkpoint-8: what SIGKILL would leave there."""

    def act(path, write):
        shutil.copytree(folder, photos / f"before {path.name}")
        write()
        content = cut_short(path)
        shutil.copytree(folder, photos / f"within {path.name}")
        path.write_bytes(content)

    def rotate(*args, **kwargs):
        if not (photos / "after trainer_state.json").exists() and (photos / "within trainer_state.json").exists():
            shutil.copytree(folder, photos / "after trainer_state.json")
        rotate_checkpoints(*args, **kwargs)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate)
    with around_writes("checkpoint-8", act):
        trainer_of(folder, save_total_limit=1, **settings).train()


@pytest.fixture(scope="module")
def cut_new(tmp_path_factory):
    """checkpoint-8 is new: checkpoint-4 is there, and nothing else."""
    folder, photos = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as monkeypatch:
        photographed(monkeypatch, folder, photos)
    return photos


@pytest.fixture(scope="module")
def cut_over(tmp_path_factory, other):
    """checkpoint-8 replaces that of another run, the only one there is: an earlier one is deleted meanwhile."""
    folder, photos = tmp_path_factory.mktemp("over"), tmp_path_factory.mktemp("photos")
    shutil.copytree(other[0] / "checkpoint-8", folder / "checkpoint-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        photographed(monkeypatch, folder, photos, save_steps=8)
    return photos


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("place", "file"), STAGES)
def test_a_kill_while_saving_costs_no_more_than_the_steps_since_the_last_save(straight, cut_new, tmp_path, place, file):
    shutil.copytree(cut_new / f"{place} {file}", tmp_path, dirs_exist_ok=True)
    assert {"checkpoint-4", "checkpoint-8"} == set(checkpoints(tmp_path))
    steps = []
    trainer = trainer_of(tmp_path, seed=2, save_total_limit=1)
    train = trainer.training_step
    trainer.training_step = lambda *args: (steps.append(trainer.state.global_step), train(*args))[1]
    trainer.train(resume_from_checkpoint=True)
    assert steps[0] == (8 if place == "after" else 4)
    assert_equal_runs(trainer, straight[1])
    assert checkpoints(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize(("place", "file"), STAGES[1::2] + STAGES[-1:])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(
    straight, other, cut_over, tmp_path, place, file
):
    """Never the weights of one with the optimizer of the other, and never none."""
    shutil.copytree(cut_over / f"{place} {file}", tmp_path, dirs_exist_ok=True)
    folder, expected = straight if place == "after" else other
    trainer = trainer_of(tmp_path, seed=2, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert_equal_runs(trainer, expected)
    assert checkpoints(tmp_path) == ["checkpoint-8"]
    found, wanted = contents(tmp_path / "checkpoint-8"), contents(folder / "checkpoint-8")
    assert found.keys() == wanted.keys()
    with_times = {"drt_state.json", "trainer_state.json", "training_args.bin"} if place == "after" else set()
    assert [name for name in found.keys() - with_times if found[name] != wanted[name]] == []


def test_a_path_given_by_hand_finds_the_checkpoint_that_was_being_replaced(other, cut_over, tmp_path):
    """As with get_last_checkpoint of transformers, which goes by the name of the folder."""
    shutil.copytree(cut_over / "within optimizer.pt", tmp_path, dirs_exist_ok=True)
    trainer = trainer_of(tmp_path, seed=2, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal_runs(trainer, other[1])


@pytest.mark.parametrize("finished", [False, True], ids=["cut short", "finished"])
def test_nothing_that_an_earlier_save_of_the_step_left_is_mixed_in(straight, tmp_path, finished):
    """Shards would be stale weights, and a random state of another number of processes belongs to none."""
    shutil.copytree(straight[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    stale = tmp_path / "checkpoint-8"
    shutil.copytree(straight[0] / "checkpoint-8", stale)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "rng_state_1.pth", "scaler.pt"):
        (stale / name).write_bytes(b"stale")
    if not finished:
        cut(stale)
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_runs(trainer, straight[1])
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert contents(stale).keys() == contents(straight[0] / "checkpoint-8").keys()


def test_a_checkpoint_cut_short_does_not_outlive_a_complete_one_of_a_lower_number(straight, tmp_path, monkeypatch):
    """On a file system without modification times the Trainer keeps the highest number."""
    monkeypatch.setattr(os.path, "getmtime", lambda path: 0.0)
    for step in (4, 8):
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    cut(tmp_path / "checkpoint-8")
    trainer = trainer_of(tmp_path, save_total_limit=1)
    trainer.add_callback(saving_at(6))
    trainer.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-6"]
    assert_equal_runs(goes_on(tmp_path), straight[1])


def saving_at(step: int):
    class SaveAndStop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == step

    return SaveAndStop()


def test_without_a_limit_nothing_is_deleted(straight, tmp_path):
    for step in (4, 8):
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    cut(tmp_path / "checkpoint-8")
    trainer = trainer_of(tmp_path)
    trainer.add_callback(saving_at(6))
    trainer.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


# ---- the system refuses to write more than a few bytes into a file, and says so to those who ask for a number


@contextlib.contextmanager
def limited_from(file: str):
    """Within, no file may become larger than 100 bytes (EFBIG), from the moment at which this one is to be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act(path, write):
        if path.name == file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        write()

    try:
        with around_writes("checkpoint-8", act):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MESSAGE = r"checkpoint-8 could not be written: .*larger than is allowed there: this process may write 100 bytes a file"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("file", FILES)
def test_a_limit_of_the_system_is_named_and_costs_no_earlier_checkpoint(straight, tmp_path, file):
    with limited_from(file), pytest.raises(OSError, match=MESSAGE):
        trainer_of(tmp_path, save_total_limit=1).train()
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert_equal_runs(goes_on(tmp_path), straight[1])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_save_that_fails_while_a_checkpoint_is_replaced_brings_it_back(other, tmp_path, file):
    shutil.copytree(other[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    before = contents(tmp_path / "checkpoint-8")
    trainer = trainer_of(tmp_path, save_total_limit=1, save_steps=8)
    with limited_from(file), pytest.raises(OSError, match=MESSAGE):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-8"]
    assert contents(tmp_path / "checkpoint-8") == before
    assert_equal_runs(goes_on(tmp_path), other[1])


def test_another_error_while_saving_stays_what_it_is(tmp_path):
    def act(path, write):
        raise RuntimeError("CUDA out of memory")

    with around_writes("checkpoint-4", act), pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        trainer_of(tmp_path).train()
    assert checkpoints(tmp_path) == []


def test_an_error_after_the_checkpoint_was_written_leaves_it(straight, tmp_path, monkeypatch):
    def rotate(*args, **kwargs):
        raise OSError("the folder cannot be listed")

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate)
    with pytest.raises(OSError, match=r"^the folder cannot be listed$"):
        trainer_of(tmp_path).train()
    monkeypatch.undo()
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert_equal_runs(goes_on(tmp_path), straight[1])


# ---- other reasons, each with its own way out


def failing_with(error: BaseException):
    def act(path, write):
        if path.name == "optimizer.pt":
            raise error
        write()

    return act


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0"),
    ],
    ids=str,
)
def test_the_error_of_a_run_whose_checkpoint_cannot_be_written_says_it(tmp_path, error):
    with (
        around_writes("checkpoint-4", failing_with(error)),
        pytest.raises(OSError, match="checkpoint-4 could not be written: ") as seen,
    ):
        trainer_of(tmp_path).train()
    assert any(meaning in str(seen.value) for meaning in ("Make room", "does not tell why"))
    assert seen.value.__cause__ is error
    assert checkpoints(tmp_path) == []


def test_a_folder_that_another_process_removes_during_the_save(straight, tmp_path):
    """For real: the writer of the next file finds no folder."""

    def act(path, write):
        if path.name == "optimizer.pt":
            shutil.rmtree(path.parent)
        write()

    message = r"checkpoint-8 could not be written: .*The folder checkpoint-8 was removed or renamed during the save"
    with around_writes("checkpoint-8", act), pytest.raises(OSError, match=message):
        trainer_of(tmp_path).train()
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert_equal_runs(goes_on(tmp_path), straight[1])


def test_an_output_folder_that_is_removed_during_the_save(tmp_path):
    def act(path, write):
        if path.name == "optimizer.pt":
            shutil.rmtree(tmp_path / "run")
        write()

    with (
        around_writes("checkpoint-4", act),
        pytest.raises(OSError, match=r"The folder .*run is gone: .* has removed it"),
    ):
        trainer_of(tmp_path / "run").train()


def test_an_output_folder_that_is_a_file(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*The folder .*run is gone"):
        trainer.train()
    assert (tmp_path / "run").read_text() == "mine"


# ---- random states


def test_a_checkpoint_without_a_random_state_that_it_names_is_passed_over(straight, tmp_path, caplog):
    for step in (4, 8):
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "rng_state.pth").unlink()
    assert_equal_runs(goes_on(tmp_path, save_strategy="no"), straight[1])
    assert "checkpoint-8 is passed over" in caplog.text
    with pytest.raises(CheckpointError, match=r"rng_state\.pth is missing: from here a process would go on with other"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_state_that_names_no_random_states_is_read_as_before(straight, tmp_path):
    """A state of an earlier version, and the way on without them."""
    folder = shutil.copytree(straight[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    text = (folder / "drt_state.json").read_text()
    assert '"random_states": [\n  "rng_state.pth"\n ],\n' in text
    (folder / "drt_state.json").write_text(text.replace('"random_states": [\n  "rng_state.pth"\n ],\n', ""))
    assert_equal_runs(goes_on(tmp_path, save_strategy="no"), straight[1])
    (folder / "rng_state.pth").unlink()
    assert goes_on(tmp_path, save_strategy="no").state.global_step == 10


# ---- real kills

CHILD = """
import sys
sys.path[:0] = {paths!r}
import conftest, torch
torch.set_num_threads(1)
from pathlib import Path
from test_saving import trainer_of
from writers import around_writes, killing
folder, step, file, place = sys.argv[1:]
with around_writes(f"checkpoint-{{step}}", killing(file, place)):
    trainer_of(Path(folder), save_total_limit=1).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("place", "file"), STAGES[:-1])
def test_kill_9_while_saving(straight, tmp_path, place, file):
    code = CHILD.format(paths=[str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    child = forked.python("-c", code, tmp_path, 8, file, place)
    assert child.returncode == -signal.SIGKILL
    assert {"checkpoint-4", "checkpoint-8"} == set(checkpoints(tmp_path))
    assert_equal_runs(goes_on(tmp_path, save_total_limit=1), straight[1])
    assert checkpoints(tmp_path) == ["checkpoint-10"]
