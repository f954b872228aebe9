"""Random kills of one of several processes: all are resumed, and the run ends as the undisturbed one, bit for bit."""

import itertools
import json
from pathlib import Path

import forked
import pytest
import torch
from kills import WORKER, Start, job

EVERY = 2  # update steps between two saves
LONG = {
    "max_steps": 60, "save_steps": EVERY, "save_total_limit": 2, "dropout": 0.1, "optim": "adamw_torch",
    "optim_args": None, "learning_rate": 3e-3, "drt_schedule": "factored@0 dense@4 adapter@9 factored@15 dense@22",
}  # fmt: skip


def undisturbed(folder: Path, engine: str, processes: int, **settings) -> Path:
    folder.mkdir()
    words = (WORKER, folder, json.dumps({"engine": engine} | settings))
    result = forked.distributed(*words, processes=processes, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def assert_nothing_is_lost(starts: list[Start]) -> None:
    """Each start goes on from the last save that was complete when the one before it was killed, or from a later one
    which was complete by then too, though the process died before it could say so."""
    for before, after in itertools.pairwise(starts):
        if after.went_on_from < 0:  # it was killed before it began to train
            continue
        assert after.went_on_from >= before.saved
        assert before.reached - after.went_on_from <= EVERY
        assert after.went_on_from % EVERY == 0
        assert f"checkpoint-{after.went_on_from}" not in before.cut_short


def assert_equal_ends(mine: Path, theirs: Path) -> None:
    mine, theirs = (torch.load(folder / "final.pt", weights_only=True) for folder in (mine, theirs))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], W) for name, W in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "ddp"])
def test_twenty_kills_of_one_of_four(tmp_path, engine):
    # Updates under DDP are so quick that a kill comes up to a dozen of them late: the run has to outlast all kills.
    settings = LONG | {"max_steps": 300 if engine == "ddp" else 60}
    straight = undisturbed(tmp_path / "straight", engine, 4, **settings)
    starts = job(tmp_path / "killed", engine, 4, kills=20, seed=1, **settings)
    print(*starts, sep="\n")
    assert [start.killed is not None for start in starts] == [True] * 20 + [False]
    assert_nothing_is_lost(starts)
    assert_equal_ends(tmp_path / "killed", straight)


@pytest.mark.slow
def test_two_kills_of_one_of_two(tmp_path):
    settings = LONG | {"max_steps": 18, "drt_schedule": "factored@0 dense@5"}
    straight = undisturbed(tmp_path / "straight", "ddp", 2, **settings)
    starts = job(tmp_path / "killed", "ddp", 2, kills=2, seed=3, **settings)
    assert_nothing_is_lost(starts)
    assert_equal_ends(tmp_path / "killed", straight)
