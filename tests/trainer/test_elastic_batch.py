"""The rows of an update, and random states, where a checkpoint is of another number of processes; none is started."""

import json
import shutil

import pytest
import tiny
import torch

import hf_drt
from hf_drt import CheckpointError, divide_batch
from hf_drt.trainer.elastic import Batch
from hf_drt.trainer.random_states import random_states

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "drt_schedule": "factored@0 dense@4"}


# ---- by hand


@pytest.mark.parametrize(
    ("rows", "per_device", "processes", "expected"),
    [
        (64, 8, 1, (8, 8)),
        (64, 8, 2, (8, 4)),
        (64, 8, 8, (8, 1)),
        (64, 8, 16, (4, 1)),
        (64, 64, 2, (32, 1)),
        (24, 5, 2, (4, 3)),
        (14, 5, 2, (1, 7)),
        (1, 9, 1, (1, 1)),
    ],
)
def test_an_update_of_any_number_of_processes_has_the_same_rows(rows, per_device, processes, expected):
    made = divide_batch(rows, per_device, processes)
    assert tuple(made.values()) == expected
    assert tuple(made) == ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert made["per_device_train_batch_size"] * made["gradient_accumulation_steps"] * processes == rows


def test_the_launcher_tells_the_number_of_processes(monkeypatch):
    assert divide_batch(16, 4)["gradient_accumulation_steps"] == 4
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert divide_batch(16, 4)["gradient_accumulation_steps"] == 2
    assert hf_drt.divide_batch is divide_batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (12, 4, 5),
            r"the 12 rows of an update cannot be divided among 5 processes\. Start 1, 2, 3, 4, 6, 12 of",
        ),
        ((0, 4, 1), r"rows must be a whole number of at least 1, got 0\."),
        ((8, 2.5, 1), r"per_device must be a whole number of at least 1, got 2\.5\."),
        ((8, 2, True), r"processes must be a whole number of at least 1, got True\."),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        divide_batch(*arguments)


# ---- at the start of a run that goes on


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """16 rows an update in 4 parts of 4, of a process that has them all."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(folder, gradient_accumulation_steps=4)
    trainer.train()
    return folder, trainer


def trainer_of(folder, **changes):
    return tiny.trainer(folder, tiny.llama(), **SETTINGS | changes)


def noted(folder, straight, **changes) -> str:
    """Checkpoint 3, as if it were of another number of processes."""
    path = shutil.copytree(straight[0] / "checkpoint-3", folder / "checkpoint-3")
    state = json.loads((path / "drt_state.json").read_text())
    state["batch"] |= changes
    (path / "drt_state.json").write_text(json.dumps(state))
    return str(path)


def same_end(trainer, straight) -> bool:
    ends = (dict(run.model.state_dict()) for run in (trainer, straight[1]))
    mine, theirs = ends
    return all(torch.equal(mine[name], W) for name, W in theirs.items())


def test_a_checkpoint_notes_the_rows_of_an_update(straight):
    state = json.loads((straight[0] / "checkpoint-3" / "drt_state.json").read_text())
    assert state["batch"] == {"rows": 16, "processes": 1, "per_device": 4, "accumulation": 4}


def test_with_the_same_settings_the_rows_are_kept(straight, tmp_path, caplog):
    """That run had two processes that accumulated over 2; this one accumulates over 4, and its settings come back."""
    folder = noted(tmp_path, straight, processes=2, accumulation=2)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=folder)
    assert same_end(trainer, straight)
    assert (
        "is of 16 rows an update on 2 processes, and these would be 8 rows an update on 1 process. To keep"
        in caplog.text
    )
    assert "this run has per_device_train_batch_size=4 and gradient_accumulation_steps=4. If you" in caplog.text
    assert trainer.args.gradient_accumulation_steps == 2
    state = json.loads((tmp_path / "checkpoint-6" / "drt_state.json").read_text())
    assert state["batch"] == {"rows": 16, "processes": 1, "per_device": 4, "accumulation": 2}


def test_a_smaller_part_per_device_is_taken_where_processes_are_many(straight, tmp_path):
    """8 per device on one process were 16 rows of two: here the trainer's own loader has the smaller batch."""
    folder = noted(tmp_path, straight, rows=4, per_device=8, accumulation=1)
    trainer = trainer_of(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    sizes = []
    trainer.compute_loss_func = lambda outputs, labels, **_: sizes.append(len(labels)) or outputs.logits.mean()
    trainer.train(resume_from_checkpoint=folder)
    assert set(sizes) == {4}
    assert (trainer.args.per_device_train_batch_size, trainer._train_batch_size) == (8, 8)


def test_other_rows_on_purpose_are_said_with_figures(straight, tmp_path, caplog):
    folder = noted(tmp_path, straight)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=folder)
    assert not same_end(trainer, straight)
    assert (
        "is of 16 rows an update on 1 process, and this run has 8 rows an update on 1 process: learning rates"
        in caplog.text
    )
    assert "To keep the rows, set per_device_train_batch_size=4 and gradient_accumulation_steps=4." in caplog.text


def test_equal_rows_in_other_parts_are_nothing_to_talk_of(straight, tmp_path, caplog):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=noted(tmp_path, straight))
    assert "rows" not in caplog.text


def test_rows_that_cannot_be_divided_are_refused(straight, tmp_path, monkeypatch):
    folder = noted(tmp_path, straight, rows=15, processes=5, per_device=3, accumulation=1)
    trainer = trainer_of(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=1)
    monkeypatch.setattr("hf_drt.trainer.elastic._data_parallel", lambda args: 2)
    message = r"is of 15 rows an update on 5 processes, and the 15 rows of an update cannot be divided among 2"
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("damage", [{"rows": 0}, {"rows": "16"}, {"more": 1}, {"rows": True}])
def test_a_damaged_note_is_refused(straight, tmp_path, damage):
    folder = noted(tmp_path, straight, **damage)
    with pytest.raises(CheckpointError, match=r"drt_state\.json is damaged: its 'batch' is .* Resume from another"):
        trainer_of(tmp_path).train(resume_from_checkpoint=folder)


def test_a_checkpoint_without_the_note_resumes_as_before(straight, tmp_path):
    path = shutil.copytree(straight[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    state = json.loads((path / "drt_state.json").read_text())
    del state["batch"]
    (path / "drt_state.json").write_text(json.dumps(state))
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=4)
    trainer.train(resume_from_checkpoint=str(path))
    assert same_end(trainer, straight)


def test_where_the_trainer_finds_the_batch_nothing_is_noted(tmp_path):
    trainer_of(tmp_path, auto_find_batch_size=True).train()
    assert "batch" not in json.loads((tmp_path / "checkpoint-3" / "drt_state.json").read_text())


def test_with_split_batches_the_number_of_processes_does_not_count(tmp_path):
    args = trainer_of(tmp_path, accelerator_config={"split_batches": True}).args
    assert Batch.of(args).rows == 8


def test_sorting_within_a_process_is_said_to_change_the_order(straight, tmp_path, caplog):
    folder = noted(tmp_path, straight, processes=2)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=4, train_sampling_strategy="group_by_length")
    trainer.train(resume_from_checkpoint=folder)
    assert "train_sampling_strategy=group_by_length sorts within what one process sees" in caplog.text


# ---- random states


class Arguments:
    def __init__(self, process: int, processes: int):
        self.process_index, self.world_size = process, processes


def states(folder, names: list[str]) -> None:
    for number, name in enumerate(names):
        torch.save({"cpu": torch.full((4,), number, dtype=torch.uint8), "python": (3, (1, 2), None)}, folder / name)


@pytest.mark.parametrize(
    ("names", "process", "processes", "expected"),
    [
        (["rng_state_0.pth", "rng_state_1.pth"], 0, 1, 0),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, 4, 1),
        (["rng_state_0.pth", "rng_state_1.pth"], 2, 4, 0),
        (["rng_state_0.pth", "rng_state_1.pth"], 3, 4, 1),
        (["rng_state.pth"], 3, 4, 0),
        ([f"rng_state_{i}.pth" for i in range(11)], 21, 24, 10),
    ],
)
def test_a_process_that_was_not_there_takes_the_state_of_one_that_was(tmp_path, names, process, processes, expected):
    states(tmp_path, names)
    with random_states(str(tmp_path), Arguments(process, processes)) as folder:
        name = f"rng_state_{process}.pth" if processes > 1 else "rng_state.pth"
        found = torch.load(f"{folder}/{name}", weights_only=True)
    assert found["cpu"].tolist() == [expected] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_without_any_state_or_without_dynamic_rank_all_is_left_to_the_trainer(tmp_path):
    with random_states(str(tmp_path), Arguments(0, 1)) as folder:
        assert folder == str(tmp_path)
    states(tmp_path, ["rng_state_0.pth"])
    with random_states(str(tmp_path), Arguments(0, 1), looks=False) as folder:
        assert folder == str(tmp_path)
    with random_states(None, Arguments(0, 1)) as folder:
        assert folder is None


def test_states_of_devices_are_those_of_one_or_of_all(tmp_path, monkeypatch):
    """Alone, a process has the state of its device; among several, a list of all that it sees."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    several = [torch.tensor([i], dtype=torch.uint8) for i in range(4)]
    torch.save({"cuda": several}, tmp_path / "rng_state_0.pth")
    with random_states(str(tmp_path), Arguments(0, 1)) as folder:
        assert torch.load(f"{folder}/rng_state.pth", weights_only=True)["cuda"].item() == 1
    with random_states(str(tmp_path), Arguments(1, 2)) as folder:
        assert [s.item() for s in torch.load(f"{folder}/rng_state_1.pth", weights_only=True)["cuda"]] == [0, 1]
    torch.save({"cuda": several[3]}, tmp_path / "rng_state_0.pth")
    with random_states(str(tmp_path), Arguments(1, 2)) as folder:
        assert [s.item() for s in torch.load(f"{folder}/rng_state_1.pth", weights_only=True)["cuda"]] == [3, 3]
