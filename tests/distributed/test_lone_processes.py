"""Processes that Accelerate does not join, and an engine that it does not set up: refused, or said."""

import json
from pathlib import Path

import forked
import pytest
import tiny
import torch.distributed as dist

from hf_drt import DRTCallback

LONE = Path(__file__).with_name("lone_worker.py")
MESSAGE = (
    r"2 processes were launched, but Accelerate has joined only 1: each would train on all data by itself and write "
    r"into the same output_dir\. Without a GPU .* use_cpu=True"
)
FELL_BACK = "fsdp was asked for, but the model is not sharded: Accelerate trains with "


def launched(folder: Path, processes: int = 2, **settings) -> list[dict]:
    result = forked.distributed(LONE, folder, json.dumps(settings), processes=processes)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"seen_{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("kind", ["mixin", "subclass", "callback", "run"])
def test_two_processes_that_are_not_joined_are_refused(tmp_path, kind):
    for seen in launched(tmp_path, kind=kind):
        assert seen["error"].startswith("2 processes were launched, but Accelerate has joined only 1: each would train")
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_with_drt_off_they_train_as_before(tmp_path):
    assert [seen.get("steps") for seen in launched(tmp_path, kind="off")] == [4, 4]


def test_joined_processes_train_and_hear_once_that_nothing_is_sharded(tmp_path):
    seen = launched(tmp_path, kind="mixin", use_cpu=True, ddp_backend="gloo", fsdp=True, ddp_timeout=600)
    assert [one.get("steps") for one in seen] == [4, 4]
    first, second = (one["messages"] for one in seen)
    wanted = f"{FELL_BACK}DistributedDataParallel on 2 processes here, as it does on a CPU"
    assert any(line.startswith(wanted) for line in first)
    assert sum(line.startswith(FELL_BACK) for line in first + second) == 1
    timeout = "ddp_timeout=600 has no effect: a process that waits for another does so for 1800 s. On a CPU"
    assert sum(line.startswith(timeout) for line in first + second) == 1


def test_an_optimizer_that_updates_before_gradients_are_averaged_is_refused(tmp_path):
    message = "optim='lomo' cannot train on several processes, with or without hf_drt: it updates the "
    for seen in launched(tmp_path, kind="mixin", use_cpu=True, ddp_backend="gloo", optim="lomo"):
        assert seen["error"].startswith(message)
        assert seen["error"].endswith("Start one process, or take the nearest that can, optim='sgd'.")


# ---- what a launcher leaves in the environment


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"MV2_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},
    ],
    ids=str,
)
def test_a_launch_is_known_from_the_environment(tmp_path, monkeypatch, environment):
    trainer = tiny.trainer(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=MESSAGE):
        DRTCallback("factored@0").on_init_end(trainer.args, None, None, model=trainer.model)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": ""},
    ],
    ids=str,
)
def test_one_process_is_one_whatever_a_cluster_sets(tmp_path, monkeypatch, environment):
    trainer = tiny.trainer(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    DRTCallback("factored@0").on_init_end(trainer.args, None, None, model=trainer.model)


def test_a_group_of_the_scripts_own_counts(tmp_path, monkeypatch):
    """torch.distributed, set up without what Accelerate looks for."""
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=MESSAGE):
        DRTCallback("factored@0").on_init_end(trainer.args, None, None, model=trainer.model)


def test_a_loop_of_ones_own_hears_it_once(tmp_path):
    for seen in launched(tmp_path, kind="loop"):
        (message,) = (line for line in seen["messages"] if "process group" in line)
        assert message.startswith(
            "2 processes were launched, but there is no process group: each trains on all data by"
        )


def test_a_loop_of_ones_own_with_a_group_hears_nothing(tmp_path):
    for seen in launched(tmp_path, kind="loop", group=True):
        assert not [line for line in seen["messages"] if "process group" in line]
