"""Kills at any moment, files cut short, and engines around the model: the last complete checkpoint goes on."""

import random
import shutil
import time
from pathlib import Path

import forked
import pytest
import tiny
import torch
import torch._dynamo
from equal_runs import assert_equal_runs

from hf_drt import CheckpointError

FILES = ["drt_state.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = tiny.trainer(folder, save_strategy="steps", save_steps=5)
    trainer.train()
    return folder, trainer


@pytest.mark.sampled(4)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_resume_true_passes_over_an_incomplete_checkpoint(finished, tmp_path, caplog, file, damage):
    folder, expected = finished
    for step in (5, 10, 15):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-15" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    trainer = tiny.trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-15 is passed over" in caplog.text
    assert_equal_runs(trainer, expected)


def test_resume_true_without_any_complete_checkpoint_says_what_is_wrong(finished, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. It has none at all"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(finished[0] / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-5: .*optimizer\.pt is missing"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=True)


STEPS, SAVE = 60, 3
CHILD = """
import sys
sys.path.insert(0, {tests!r})
import conftest, tiny, time, torch
from pathlib import Path
from transformers import TrainerCallback
torch.set_num_threads(1)
folder = Path(sys.argv[1])
class Report(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        with open(folder / "log", "a") as log: log.write(f"begin {{state.global_step}}\\n")
    def on_step_end(self, args, state, control, **kwargs):
        with open(folder / "log", "a") as log: log.write(f"step {{state.global_step}}\\n")
        time.sleep(0.05)
    def on_save(self, args, state, control, **kwargs):
        with open(folder / "log", "a") as log: log.write(f"saved {{state.global_step}}\\n")
    def on_train_end(self, args, state, control, **kwargs):
        with open(folder / "log", "a") as log: log.write("end\\n")
trainer = tiny.trainer(folder, max_steps={steps}, save_strategy="steps", save_steps={save})
trainer.add_callback(Report())
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/drt_state.json")) or None)
torch.save(trainer.model.state_dict(), folder / "final.pt")
"""


@pytest.mark.slow
def test_thirty_random_kills_lose_no_more_than_the_steps_since_the_last_save(tmp_path):
    """SIGKILL at random moments: in steps, in switches, while a checkpoint is written."""
    expected = tiny.trainer(tmp_path / "straight", max_steps=STEPS)
    expected.train()
    folder, log = tmp_path / "killed", tmp_path / "killed" / "log"
    folder.mkdir()
    log.write_text("")
    code = CHILD.format(tests=str(Path(__file__).parents[1]), steps=STEPS, save=SAVE)
    chance, kills, saved = random.Random(0), 0, 0
    while not (folder / "final.pt").exists():
        before = len(log.read_text().splitlines())
        child = forked.start("-c", code, folder, output=tmp_path)
        while len(log.read_text().splitlines()) == before and child.is_alive():
            time.sleep(0.01)
        if kills < 30:
            time.sleep(chance.uniform(0.0, 0.35))
            child.kill()
            kills += 1
        child.join(300)
        error = (tmp_path / "stderr").read_text()
        lines = [line.split() for line in log.read_text().splitlines()[before:]]
        assert lines, error[-2000:]
        assert int(lines[0][1]) >= saved, "went back behind a complete checkpoint"
        saved = max([saved, *(int(words[1]) for words in lines if words[0] == "saved")])
    assert kills == 30
    final = torch.load(folder / "final.pt", weights_only=True)
    assert all(torch.equal(final[name], p) for name, p in expected.model.state_dict().items())


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_per_phase_and_equals_the_eager_one(tmp_path):
    settings = {"max_steps": 12, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 4}
    settings["drt_schedule"] = "factored@0 dense@3 adapter@6 factored@9"
    eager = tiny.trainer(tmp_path / "eager", model=tiny.llama(), **settings)
    eager.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = tiny.trainer(tmp_path / "compiled", model=tiny.llama(), torch_compile=True, **settings)
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]
    for (name, p), q in zip(compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True):
        assert "_orig_mod" not in name
        assert torch.allclose(p, q, atol=1e-3), name
    resumed = tiny.trainer(tmp_path / "resumed", model=tiny.llama(), torch_compile=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-8"))
    pairs = zip(resumed.model.parameters(), eager.model.parameters(), strict=True)
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in pairs)


@pytest.mark.parametrize("settings", [{"bf16": True, "use_cpu": True}, {"activation_checkpointing": True}], ids=str)
def test_a_whole_cycle_under_autocast_or_checkpointing_resumes_bitwise(tmp_path, settings):
    expected = tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=7, **settings)
    expected.train()
    for step in (7, 14):
        trainer = tiny.trainer(tmp_path / "b", **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(trainer, expected)


def test_adapters_learn_under_activation_checkpointing_with_everything_else_frozen(tmp_path):
    model = tiny.llama()
    settings = {"drt_schedule": "adapter@0", "drt_export": "native", "max_steps": 4}
    trainer = tiny.trainer(tmp_path, model=model, activation_checkpointing=True, **settings)
    for p in model.get_input_embeddings().parameters():
        p.requires_grad_(False)
    trainer.train()
    for name in trainer.drt.targets:
        assert model.get_submodule(name).lora_B.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_whole_cycle_with_weights_in_half_precision(tmp_path, dtype):
    trainer = tiny.trainer(tmp_path, model=tiny.llama().to(dtype), learning_rate=1e-2)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {dtype}
    rows = [row for row in trainer.state.log_history if "drt_switch_seconds" in row]
    assert len(rows) == 4
    assert all(row["drt_merge_error"] < 0.1 for row in rows)
    assert 0 < rows[1]["drt_merge_error"]
