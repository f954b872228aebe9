"""A run goes on with another number of processes, before and after a switch, with the losses of the undisturbed run."""

import json
from pathlib import Path

import forked
import pytest
from elastic_worker import told
from processes import a_group_of_one

WORKER = Path(__file__).with_name("elastic_worker.py")


def run(folder: Path, processes: int, engine: str, **settings) -> list[dict]:
    """Until the end, or to ``until``; the events. A single process is started as by torchrun --nproc_per_node 1."""
    folder.mkdir(exist_ok=True)
    before = len(told(folder))
    words, group = (WORKER, folder, json.dumps({"engine": engine} | settings)), {}
    if processes == 1:
        group = a_group_of_one()
    result = forked.distributed(*words, processes=processes, timeout=120, **group)
    assert result.returncode == 0, result.stderr[-5000:]
    return told(folder)[before:]


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """On one process, without any engine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, 1, "ddp", gradient_accumulation_steps=4, save_strategy="no")
    return losses(folder)


@pytest.mark.parametrize(
    "engine",
    ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), pytest.param("fsdp2_full", marks=pytest.mark.slow)],
)
def test_two_processes_then_four_then_one(undisturbed, tmp_path, engine):
    """The switches are at 4 and 9: four processes resume before one and come through it, one resumes before the other,
    within an epoch and in a phase of another form."""
    begun = run(tmp_path, 2, engine, until=2)
    assert begun[0] == {"begins": 0, "processes": 2, "rows": [4, 2, 2]}
    four = run(tmp_path, 4, engine, until=7)
    warning, begins = four[0]["warning"], four[1]
    assert begins == {"begins": 2, "processes": 4, "rows": [4, 1, 4]}
    assert "checkpoint-2 is of 16 rows an update on 2 processes, and these would be 32 rows an update on 4" in warning
    assert "this run has per_device_train_batch_size=4 and gradient_accumulation_steps=1" in warning
    one = run(tmp_path, 1, engine)
    assert [event for event in one if "begins" in event] == [{"begins": 7, "processes": 1, "rows": [4, 4, 1]}]
    assert losses(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    assert json.loads((tmp_path / "checkpoint-12" / "drt_state.json").read_text())["batch"] == {
        "rows": 16, "processes": 1, "per_device": 4, "accumulation": 2,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2_full"])
@pytest.mark.parametrize("numbers", [(1, 2), (4, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("step", [4, 6, 9])
def test_other_numbers_of_processes(undisturbed, tmp_path, engine, numbers, step):
    """At a switch, before its first update; within a phase; and at the last one."""
    first, then = numbers
    accumulation = {1: 4, 2: 2, 4: 1}[first]
    run(tmp_path, first, engine, until=step, gradient_accumulation_steps=accumulation)
    run(tmp_path, then, engine, gradient_accumulation_steps=accumulation)
    assert losses(tmp_path) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
def test_with_a_batch_that_is_divided_by_hand_nothing_has_to_be_set(undisturbed, tmp_path):
    """As a script does by divide_batch(16, per_device=4)."""
    run(tmp_path, 2, "ddp", until=2)
    four = run(tmp_path, 4, "ddp", gradient_accumulation_steps=1)
    assert not [event for event in four if "warning" in event]
    assert losses(tmp_path) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
def test_an_epoch_that_ends_within_an_update_has_the_same_number_of_updates(tmp_path):
    """64 rows in updates of 24, of which the last has 16: the length of the run is in epochs."""
    settings = {"max_steps": -1, "num_train_epochs": 4, "drt_schedule": "factored@0 dense@50%"}
    parts = {"one": 6, "two": 3}
    run(tmp_path / "one", 1, "ddp", gradient_accumulation_steps=parts["one"], save_strategy="no", **settings)
    run(tmp_path / "two", 2, "ddp", gradient_accumulation_steps=parts["two"], until=5, **settings)
    run(tmp_path / "two", 1, "ddp", gradient_accumulation_steps=parts["two"], **settings)
    assert len(losses(tmp_path / "two")) == 12
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
