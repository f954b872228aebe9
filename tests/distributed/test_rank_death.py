"""One process of two dies: the job ends with an error, and goes on bitwise when it is started again."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import hf_drt.trainer.checkpoint as checkpoint
from hf_drt import CheckpointError

MORTAL = Path(__file__).with_name("mortal.py")
SECONDS = 180  # to start, train and end, of which torchrun gives the other process 30; collectives wait for 1800


def launch(folder: Path, **settings) -> subprocess.CompletedProcess:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run(
        [*command, str(MORTAL), str(folder), json.dumps(settings)], capture_output=True, text=True, timeout=SECONDS
    )


def assert_goes_on(folder: Path, expected: Path, **settings) -> None:
    result = launch(folder, resume=True, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    weights, wanted = (torch.load(path / "final.pt", weights_only=True) for path in (folder, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    state, wanted = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (folder, expected))
    assert state.keys() == wanted.keys()
    for index, entries in wanted.items():
        assert all(torch.equal(torch.as_tensor(state[index][key]), torch.as_tensor(entries[key])) for key in entries)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    result = launch(folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "place", "left"),
    [
        (1, "step", 10),
        (1, "switch", 15),
        (0, "switch", 15),
        (1, "saving rng_state_1.pth", 10),
        (0, "saving optimizer.pt", 10),
        (0, "saving rng_state_0.pth", 10),
    ],
)
def test_the_job_ends_and_goes_on_bitwise_after_the_death_of_a_process(straight, tmp_path, rank, place, left):
    """Only the last checkpoint is kept: it must not go before every process has written its part of the next."""
    result = launch(tmp_path, rank=rank, place=place, save_total_limit=1)
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr, result.stderr[-3000:]
    assert [path.parent.name for path in tmp_path.glob("*/trainer_state.json")] == [f"checkpoint-{left}"]
    assert_goes_on(tmp_path, straight)


@pytest.mark.slow
def test_a_jit_checkpoint_is_written_by_all_processes_in_the_same_step(straight, tmp_path):
    """Though only one has got the signal by then."""
    result = launch(tmp_path, rank=1, place="sigterm", enable_jit_checkpoint=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "last").read_text() == "14"
    assert {path.name for path in (tmp_path / "checkpoint-14").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert_goes_on(tmp_path, straight)


@pytest.mark.slow
def test_processes_on_file_systems_of_their_own_pick_a_checkpoint_that_both_have(straight, tmp_path):
    """Process 1 lacks its random state of the newest, so that process 0 passes over it too."""
    for step in (10, 15):
        shutil.copytree(straight / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-15" / "rng_state_1.pth").unlink()
    result = launch(tmp_path, resume=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rng_state_1.pth is missing" in result.stderr
    weights, wanted = (torch.load(path / "final.pt", weights_only=True) for path in (tmp_path, straight))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


# ---- which checkpoint, without a second process


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Checkpoints 5 and 10 as two processes leave them, whose files differ from one's in the random states only."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.trainer(folder, max_steps=10, save_strategy="steps", save_steps=5).train()
    for path in folder.iterdir():
        state = json.loads((path / "drt_state.json").read_text())
        assert state["random_states"] == ["rng_state.pth"]
        names = ["rng_state_0.pth", "rng_state_1.pth"]
        (path / "drt_state.json").write_text(json.dumps(state | {"random_states": names}))
        for name in names:
            shutil.copy(path / "rng_state.pth", path / name)
        (path / "rng_state.pth").unlink()
    return folder


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_checkpoint_of_two_processes_lacks_the_random_state_of_one(finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert checkpoint.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    path = tmp_path / "checkpoint-10" / "rng_state_1.pth"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    assert checkpoint.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(("process", "chosen"), [(0, "checkpoint-10"), (1, "checkpoint-5"), (2, "checkpoint-5")])
def test_each_process_looks_after_its_own_random_state(finished, tmp_path, monkeypatch, process, chosen):
    """And one that had none in the run that saved, after all of them."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-10" / "rng_state_1.pth").unlink()

    class State:
        process_index, num_processes = process, 3

    monkeypatch.setattr(checkpoint, "PartialState", State)
    assert checkpoint.last_complete_checkpoint(tmp_path) == str(tmp_path / chosen)


def test_what_another_process_cannot_read_is_passed_over(finished, monkeypatch, caplog):
    faults = {"checkpoint-10": "its disk is empty"}
    monkeypatch.setattr(checkpoint, "_fault", lambda folder: None)
    asked = iter(["checkpoint-10", "checkpoint-5"])
    monkeypatch.setattr(checkpoint, "gather_object", lambda own: [*own, faults.get(next(asked))])
    assert checkpoint.last_complete_checkpoint(finished) == str(finished / "checkpoint-5")
    assert "checkpoint-10 is passed over: its disk is empty" in caplog.text


def test_process_0_says_which_checkpoints_there_are(finished, monkeypatch):
    """A folder that appears while the processes look must not send them different ways."""
    monkeypatch.setattr(checkpoint, "broadcast_object_list", lambda own: [["checkpoint-5"]])
    assert checkpoint.last_complete_checkpoint(finished) == str(finished / "checkpoint-5")


@pytest.mark.parametrize("names", ["rng_state.pth", [1], ["../rng_state.pth"]])
def test_a_damaged_list_of_random_states_is_refused(finished, tmp_path, names):
    folder = shutil.copytree(finished / "checkpoint-5", tmp_path / "checkpoint-5")
    state = json.loads((folder / "drt_state.json").read_text())
    (folder / "drt_state.json").write_text(json.dumps(state | {"random_states": names}))
    with pytest.raises(CheckpointError, match=r"drt_state\.json is damaged: its 'random_states' is"):
        checkpoint.last_complete_checkpoint(tmp_path)


def test_with_a_folder_on_each_node_a_checkpoint_holds_the_random_states_of_the_node(monkeypatch):
    class Arguments:
        world_size, process_index, local_process_index, save_on_each_node = 4, 3, 1, True

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert checkpoint.random_state_files(Arguments) == ["rng_state_2.pth", "rng_state_3.pth"]
    Arguments.save_on_each_node = False
    assert len(checkpoint.random_state_files(Arguments)) == 4
