"""Scripts of the usual kind: as they are, with one line added, and unchanged under ``python -m hf_drt.run``."""

import csv
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as T
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer

from hf_drt import run

SCRIPTS = Path(__file__).parents[1] / "scripts"
ROOT = SCRIPTS.parents[1]
NAMES = ("run_clm", "run_glue", "run_image_classification")
ADDED = "from hf_drt import DRTTrainer as Trainer, DRTTrainingArguments as TrainingArguments\n"
PHASES = "factored@0 dense@4 adapter@8"
DRT = ("--drt_schedule", PHASES, "--drt_rank_ratio", "0.125", "--drt_rank_multiple", "4", "--drt_rewarmup_steps", "2")
COMMON = (
    "--do_train", "--do_eval", "--max_steps", "12", "--save_steps", "2", "--per_device_train_batch_size", "4",
    "--learning_rate", "3e-3", "--logging_steps", "3", "--report_to", "none", "--disable_tqdm", "True",
    "--dataloader_pin_memory", "False", "--remove_unused_columns",
)  # fmt: skip

every_script = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Texts, sentences, images, a tokenizer and configurations with dropout, all in one folder."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = ["good", "bad", "film", "plot", "a", "the", "was", "is", "very", "not"]
    sentences = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(80)]
    (folder / "train.txt").write_text("\n".join(sentences[:60]))
    (folder / "validation.txt").write_text("\n".join(sentences[60:]))
    for split, rows in (("train", sentences[:60]), ("validation", sentences[60:])):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *((s, int("good" in s)) for s in rows)])
    images = [[[rng.randrange(256) for _ in range(8)] for _ in range(8)] for _ in range(48)]
    rows = (json.dumps({"image": image, "label": f"class{i % 3}"}) for i, image in enumerate(images))
    (folder / "images.jsonl").write_text("\n".join(rows))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences, vocab_size=300, special_tokens=["<pad>"], show_progress=False)
    T.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    tiny.llama(vocab_size=300, attention_dropout=0.1).config.save_pretrained(folder / "llama")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    T.BertConfig(vocab_size=300, **sizes).save_pretrained(folder / "bert")
    vit = T.ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_dropout_prob=0.1, **sizes)
    vit.save_pretrained(folder / "vit")
    return folder


def flags(world: Path, name: str, out: Path) -> list[str]:
    """The command line of a script, without ``drt_*`` flags."""
    own = {
        "run_clm": {"config_name": "llama", "tokenizer_name": "tokenizer", "train_file": "train.txt",
                    "validation_file": "validation.txt"},
        "run_glue": {"config_name": "bert", "tokenizer_name": "tokenizer", "train_file": "train.csv",
                     "validation_file": "validation.csv"},
        "run_image_classification": {"config_name": "vit", "train_file": "images.jsonl"},
    }[name]  # fmt: skip
    pairs = [word for flag, file in own.items() for word in (f"--{flag}", str(world / file))]
    columns = "False" if name == "run_image_classification" else "True"
    return [*pairs, "--cache_dir", str(world / "cache"), *COMMON, columns, "--output_dir", str(out)]


def with_one_line_added(name: str, folder: Path) -> Path:
    """A copy of the script in which hf_drt's names shadow those of transformers."""
    text = (SCRIPTS / f"{name}.py").read_text()
    imports, dataclass, rest = text.partition("\n\n@dataclass\n")
    changed = folder / f"{name}.py"
    changed.write_text(imports + ADDED + dataclass + rest)
    assert len(changed.read_text().splitlines()) == len(text.splitlines()) + 1
    return changed


def run_plainly(monkeypatch, script: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")


def assert_same_weights(folder: Path, other: Path) -> None:
    weights, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def phases(folder: Path) -> list[int]:
    """The phases whose beginning the trainer's log holds."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["drt_phase"] for row in history if "drt_switch_seconds" in row]


@every_script
def test_one_added_line_makes_a_script_dynamic_rank_and_hf_drt_run_needs_none(monkeypatch, world, tmp_path, name):
    changed = with_one_line_added(name, tmp_path)
    run_plainly(monkeypatch, changed, *flags(world, name, tmp_path / "changed"), *DRT)
    run.main([str(SCRIPTS / f"{name}.py"), *DRT, *flags(world, name, tmp_path / "unchanged")])
    assert_same_weights(tmp_path / "changed", tmp_path / "unchanged")
    for out in ("changed", "unchanged"):
        assert phases(tmp_path / out) == [0, 1, 2]
        metrics = json.loads((tmp_path / out / "all_results.json").read_text())
        assert 0 <= metrics["eval_accuracy"] <= 1
    names = load_file(tmp_path / "unchanged" / "model.safetensors")  # dense: for plain transformers
    assert not any("lora" in key or key.endswith((".U", ".V")) for key in names)


@every_script
def test_an_added_line_without_flags_changes_nothing(monkeypatch, world, tmp_path, name):
    run_plainly(monkeypatch, SCRIPTS / f"{name}.py", *flags(world, name, tmp_path / "as is"))
    run_plainly(
        monkeypatch, with_one_line_added(name, tmp_path), *flags(world, name, tmp_path / "changed"),
    )  # fmt: skip
    assert_same_weights(tmp_path / "as is", tmp_path / "changed")
    assert phases(tmp_path / "as is") == phases(tmp_path / "changed") == []


@every_script
def test_a_script_resumes_by_itself_from_its_last_checkpoint(world, tmp_path, name):
    command = [str(SCRIPTS / f"{name}.py"), *DRT]
    run.main([*command, *flags(world, name, tmp_path / "straight")])
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > 6:
            shutil.rmtree(checkpoint)
    (tmp_path / "cut" / "model.safetensors").unlink()
    run.main([*command, *flags(world, name, tmp_path / "cut")])
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")
    assert phases(tmp_path / "cut") == [0, 1, 2]


# ---- as programs


def program(*words: str, **changes) -> subprocess.CompletedProcess:
    """A Python process of its own, on one thread as this one is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=560, env=environment)


def test_the_program_trains_what_main_trains(world, tmp_path):
    run.main([str(SCRIPTS / "run_clm.py"), *DRT, *flags(world, "run_clm", tmp_path / "main")])
    words = [str(SCRIPTS / "run_clm.py"), *flags(world, "run_clm", tmp_path / "program"), *DRT]
    done = program("-m", "hf_drt.run", *words)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "main", tmp_path / "program")
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf_drt.trainer.")]
    assert "dynamic-rank plan: factored@0 dense@4 adapter@8 (of 12 update steps) on 14 layers" in lines[0]
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["phase 1 (dense)", "phase 2 (adapter)"]


@pytest.mark.slow
def test_a_failing_script_leaves_its_own_traceback(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("def f():\n    raise ValueError('of the script')\nf()\n")
    done, plain = program("-m", "hf_drt.run", str(script), *DRT), program(str(script))
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)
    assert plain.returncode == 1


@pytest.mark.slow
@every_script
def test_all_three_ways_as_programs(world, tmp_path, name):
    script, changed = str(SCRIPTS / f"{name}.py"), str(with_one_line_added(name, tmp_path))
    ways = {
        "as is": [script],
        "changed, off": [changed],
        "changed": [changed, *DRT],
        "unchanged": ["-m", "hf_drt.run", script, *DRT],
    }
    for out, words in ways.items():
        done = program(*words, *flags(world, name, tmp_path / out))
        assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "changed", tmp_path / "unchanged")
    assert_same_weights(tmp_path / "as is", tmp_path / "changed, off")
    assert phases(tmp_path / "unchanged") == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631", "-m"),
        ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "-m"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_run_the_script(world, tmp_path, launcher):
    script, processes = str(SCRIPTS / "run_clm.py"), 2 if "torch.distributed.run" in launcher else 1
    # As many rows an update as one process takes, so that every launcher's run sees the same data.
    rows = ["--per_device_train_batch_size", str(4 // processes), "--use_cpu", "True"]
    done = program("-m", *launcher, "hf_drt.run", script, *DRT, *flags(world, "run_clm", tmp_path / "out"), *rows)
    assert done.returncode == 0, done.stderr
    assert phases(tmp_path / "out") == [0, 1, 2]
    assert done.stderr.count("hf_drt.trainer.announce: dynamic-rank plan") == 1  # of the first process
