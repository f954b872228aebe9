"""What is not ours is never deleted: folders where checkpoints are saved, and model files where a model is."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import hf_drt.export.leftovers as leftovers
from hf_drt import DRTTrainer
from hf_drt.checkpoint.state_file import write_state
from hf_drt.export import base_state_dict
from hf_drt.trainer.saving import MARK

SETTINGS = {
    "max_steps": 6, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2,
    "logging_strategy": "no", "drt_schedule": "factored@0 dense@3",
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def filled(folder: Path, **files: str) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (files or {"notes.txt": "mine"}).items():
        (folder / name).write_text(text)
    return tree(folder)


# ---- checkpoints


@pytest.mark.sampled(5)
@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize(
    "name", ["checkpoint-best", "checkpoint-", "checkpoint-2-old", "checkpoint-x5", "checkpoint-99"]
)
def test_a_folder_of_the_users_stays(tmp_path, name, limit):
    """And beside it the checkpoints that stay under a plain Trainer, whose rotation goes by age."""
    for cls in (DRTTrainer, Trainer):
        own = SETTINGS if cls is DRTTrainer else SETTINGS | {"drt_schedule": None}
        folder = tmp_path / cls.__name__
        trainer = tiny.trainer(folder, cls=cls, save_total_limit=limit, **own)
        content = filled(folder / name, **{"model.safetensors": "mine"})
        stamps = {step: 1e9 + step for step in (2, 4, 6)}
        aged(trainer, folder, name, stamps)
        trainer.train()
        assert tree(folder / name) == content
    assert left(tmp_path / "DRTTrainer") == left(tmp_path / "Trainer")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def aged(trainer, folder: Path, name: str, stamps: dict[int, float]) -> None:
    """Modification times in the order of writing, seconds apart; the user's folder is the newest."""

    class Age(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for step, time in stamps.items():
                if (folder / f"checkpoint-{step}").exists():
                    os.utime(folder / f"checkpoint-{step}", (time, time))

    trainer.add_callback(Age())
    future = 4e9
    os.utime(folder / name, (future, future))


FOREIGN = {
    "notes": lambda folder: filled(folder),
    "weights": lambda folder: filled(folder, **{"model.safetensors": "mine", "config.json": "{}"}),
    "a plain checkpoint": lambda folder: filled(folder, **{"trainer_state.json": "{}", "optimizer.pt": "mine"}),
    "cut short by another": lambda folder: filled(folder, **{"drt_state.json": "{}", "model.safetensors": "mine"}),
    "a subfolder": lambda folder: filled(folder / "inner"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_where_a_checkpoint_is_saved_is_moved_aside(tmp_path, caplog, make):
    """Without a limit: the Trainer's rotation takes any checkpoint-* for one of its own."""
    trainer = tiny.trainer(tmp_path, **SETTINGS)
    make(tmp_path / "checkpoint-4")
    content = tree(tmp_path / "checkpoint-4")
    trainer.train()
    assert left(tmp_path) == ["_checkpoint-4.kept", "checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert tree(tmp_path / "_checkpoint-4.kept") == content
    assert (
        "checkpoint-4 is not of this run, and stood where it writes: it was moved to _checkpoint-4.kept" in caplog.text
    )
    tiny.trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)


def test_each_that_is_moved_aside_has_a_name_of_its_own(tmp_path):
    for number in (1, 2, 3):
        filled(tmp_path / "checkpoint-4", **{"notes.txt": str(number)})
        tiny.trainer(tmp_path, **SETTINGS).train()
        shutil.rmtree(tmp_path / "checkpoint-4")
    assert [(tmp_path / f"_checkpoint-4.kept{end}" / "notes.txt").read_text() for end in ("", "-2", "-3")] == [*"123"]


def test_a_file_or_a_link_where_a_checkpoint_is_saved_is_moved_aside(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    content = filled(elsewhere)
    run.mkdir()
    (run / "checkpoint-2").symlink_to(elsewhere)
    (run / "checkpoint-4").write_text("mine")
    tiny.trainer(run, **SETTINGS).train()
    assert tree(elsewhere) == content
    assert (run / "_checkpoint-2.kept").is_symlink()
    assert (run / "_checkpoint-4.kept").read_text() == "mine"
    assert (run / "checkpoint-2" / "trainer_state.json").is_file()


def test_a_save_that_fails_leaves_what_it_has_moved_aside(tmp_path):
    content = filled(tmp_path / "checkpoint-2")

    class Failing(DRTTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="checkpoint-2 could not be written"):
        tiny.trainer(tmp_path, cls=Failing, **SETTINGS).train()
    assert left(tmp_path) == ["_checkpoint-2.kept"]
    assert tree(tmp_path / "_checkpoint-2.kept") == content


def test_a_file_that_a_callback_adds_to_a_checkpoint_outlives_its_replacement(tmp_path):
    """As in a plain Trainer, which writes over the files of a checkpoint and leaves others alone."""
    tiny.trainer(tmp_path, **SETTINGS).train()
    (tmp_path / "checkpoint-4" / "scores.json").write_text("mine")
    (tmp_path / "checkpoint-4" / "plots").mkdir()
    (tmp_path / "checkpoint-4" / "plots" / "loss.png").write_text("mine")
    (tmp_path / "checkpoint-4" / "rng_state_1.pth").write_text("of another number of processes")
    tiny.trainer(tmp_path, **SETTINGS).train()
    assert (tmp_path / "checkpoint-4" / "scores.json").read_text() == "mine"
    assert (tmp_path / "checkpoint-4" / "plots" / "loss.png").read_text() == "mine"
    assert not (tmp_path / "checkpoint-4" / "rng_state_1.pth").exists()
    assert left(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_folder_in_the_place_of_a_replaced_checkpoint_is_moved_aside(tmp_path):
    tiny.trainer(tmp_path, **SETTINGS).train()
    content = filled(tmp_path / ".checkpoint-4.replaced")
    tiny.trainer(tmp_path, **SETTINGS).train()
    assert tree(tmp_path / "_.checkpoint-4.replaced.kept") == content


@pytest.mark.parametrize("name", [".checkpoint-9.replaced", ".checkpoint-mine.replaced"])
def test_a_folder_with_the_name_of_a_replaced_checkpoint_does_not_come_back_as_one(tmp_path, name):
    tiny.trainer(tmp_path, **SETTINGS).train()
    content = filled(tmp_path / name)
    tiny.trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)
    assert tree(tmp_path / name) == content


def test_a_finished_checkpoint_bears_no_mark(tmp_path):
    seen = []

    class Watch(DRTTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append((Path(output_dir) / MARK).is_file())
            return super()._save_optimizer_and_scheduler(output_dir)

    tiny.trainer(tmp_path, cls=Watch, **SETTINGS).train()
    assert seen == [True] * 3
    assert not list(tmp_path.rglob(MARK))
    (tmp_path / "checkpoint-4" / MARK).touch()  # killed between the last file and the mark
    tiny.trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)
    assert not list(tmp_path.rglob(MARK))


def test_a_state_that_cannot_be_written_leaves_no_temporary_file(tmp_path):
    (tmp_path / "drt_state.json").mkdir()
    with pytest.raises(OSError, match="drt_state"):
        write_state(tmp_path, {"step": 1})
    assert left(tmp_path) == ["drt_state.json"]


# ---- models

ADAPTER = {"max_steps": 2, "save_strategy": "no", "drt_schedule": "adapter:4@0", "gradient_accumulation_steps": 1}


def run(folder: Path, export: str):
    trainer = tiny.trainer(folder, drt_export=export, **ADAPTER)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def another_process(monkeypatch):
    """Forget what was written so far, as a process that is started anew."""
    return lambda: monkeypatch.setattr(leftovers, "_written", {})


@pytest.mark.parametrize("export", ["dense", "native"])
def test_an_adapter_of_the_users_is_moved_aside_by_a_whole_model(tmp_path, export, caplog):
    filled(tmp_path, **{"adapter_config.json": '{"mine": 1}', "adapter_model.safetensors": "mine", "notes.txt": "mine"})
    base = filled(tmp_path / "base", **{"model.safetensors": "mine", "config.json": "{}"})
    run(tmp_path, export)
    assert (tmp_path / "_adapter_config.json.kept").read_text() == '{"mine": 1}'
    assert (tmp_path / "_adapter_model.safetensors.kept").read_text() == "mine"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert tree(tmp_path / "base") == base  # nothing reads it with the model
    assert caplog.text.count("is not of this run, and stood where it writes") == 2


def test_a_model_and_a_base_folder_of_the_users_are_moved_aside_by_an_adapter(tmp_path):
    """The output folder is that of the model which is trained."""
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    filled(tmp_path, **{"adapter_config.json": "mine", "notes.txt": "mine"})
    base = filled(tmp_path / "base", **{"model.safetensors": "mine", "README.md": "mine"})
    before = tree(tmp_path)
    trainer = run(tmp_path, "adapter")
    for name in ("config.json", "generation_config.json", "model.safetensors", "adapter_config.json"):
        assert (tmp_path / f"_{name}.kept").read_bytes() == before[name]
        assert not (tmp_path / name).exists() or name.startswith("adapter")
    assert tree(tmp_path / "_base.kept") == base
    loaded, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict(),
        base_state_dict(trainer.model),
    )
    assert all(torch.equal(p, expected[name]) for name, p in loaded.items())


@pytest.mark.parametrize("again", [False, True], ids=["one process", "a process each"])
def test_files_of_our_own_are_replaced(tmp_path, another_process, again, caplog):
    caplog.set_level(logging.WARNING, "hf_drt.export.leftovers")
    for export in ("adapter", "adapter", "dense", "native"):
        run(tmp_path, export)
        if again:
            another_process()
    assert not [path for path in tmp_path.rglob("*") if ".kept" in path.name]
    assert not list(tmp_path.glob("adapter_*")) + list((tmp_path / "base").glob("*.safetensors"))


def test_a_whole_model_of_another_process_is_kept(tmp_path, another_process):
    """Nothing in its files says whose it is."""
    run(tmp_path, "dense")
    dense = (tmp_path / "model.safetensors").read_bytes()
    run(tmp_path, "adapter")
    assert not list(tmp_path.glob("_*"))
    run(tmp_path, "dense")
    another_process()
    run(tmp_path, "adapter")
    assert (tmp_path / "_model.safetensors.kept").read_bytes() == dense


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "base/model.safetensors"])
def test_what_the_user_has_put_in_the_place_of_a_file_of_ours_is_kept(tmp_path, name):
    """Of the same size: the content decides."""
    run(tmp_path, "adapter")
    content = (tmp_path / name).read_bytes()
    own = content[:-4] + bytes(4) if content[-4:] != bytes(4) else content[:-4] + b"mine"
    (tmp_path / name).write_bytes(own)
    run(tmp_path, "adapter")
    kept = [path.read_bytes() for path in tmp_path.rglob("*.safetensors*") if ".kept" in str(path)]
    assert own in kept


def test_an_adapter_whose_base_was_cut_short_is_written_again(tmp_path, another_process):
    """The record says that it was being written: what lies in the base is ours."""
    run(tmp_path, "adapter")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "base" / leftovers.RECORD).write_text(json.dumps({"unfinished": True}))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).unlink()
    another_process()
    run(tmp_path, "adapter")
    assert not [path for path in tmp_path.rglob("*") if ".kept" in path.name]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base") is not None


def test_nothing_is_moved_if_the_model_is_refused(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, drt_export="adapter", **ADAPTER)
    trainer.train()
    before = filled(tmp_path, **{"config.json": "mine", "adapter_config.json": "mine"})

    def refuse(model):
        raise ValueError("PEFT has no way to express it")

    monkeypatch.setattr("hf_drt.export.peft.exporter.check_adapters", refuse)
    with pytest.raises(ValueError, match="PEFT has no way"):
        trainer.save_model()
    assert tree(tmp_path) == before
