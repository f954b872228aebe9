"""The main recipe, small: trains, prints its table, resumes, loads, and refuses what it cannot use."""

import math
import shlex

import pretrain_clm
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_drt.report import read_runs, write_page

SMALL = [
    "--max_texts", "12", "--hidden_size", "64", "--layers", "1", "--vocab_size", "400", "--block_size", "32",
    "--max_steps", "10", "--warmup_steps", "2", "--max_eval_blocks", "8", "--disable_tqdm", "true",
    "--drt_log_rank_steps", "5", "--save_steps", "2",
]  # fmt: skip


def run(folder, *flags):
    cache = str(folder / "cache")
    return pretrain_clm.main([*SMALL, "--output_dir", str(folder / "out"), "--cache_dir", cache, *flags])


def test_it_ends_with_a_table_and_a_model_that_loads(tmp_path, capsys):
    trainer = run(tmp_path)
    out = capsys.readouterr().out
    for word in ("factored:0.125@0  (of 10 update steps)", "trainable", "eval loss", "eff. rank", "seconds"):
        assert word in out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert [row.split("│")[2].strip() for row in rows] == ["factored"]
    assert trainer.drt.config.matrix_optimizer == "muon"
    assert not any(cell.strip() == "-" for row in rows for cell in row.split("│"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("def main():\n    return", return_tensors="pt")["input_ids"]
    trainer.model.eval()
    with torch.no_grad():
        assert (model(ids).logits - trainer.model(ids).logits).abs().max() < 1e-5


def test_every_phase_of_auto_late_is_evaluated(tmp_path, capsys):
    trainer = run(tmp_path, "--drt_schedule", "auto_late")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[2].strip() for row in rows] == ["factored", "dense"]
    assert not any(cell.strip() == "-" for row in rows for cell in row.split("│"))
    assert str(trainer.drt.plan) == "factored:0.125@0 dense@9"


def test_it_resumes_from_the_last_checkpoint(tmp_path):
    paper = ("--drt_schedule", "paper")
    expected = run(tmp_path / "a", *paper)
    run(tmp_path / "b", *paper, "--save_total_limit", "10")
    for folder in (tmp_path / "b" / "out").glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > 6:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    resumed = run(tmp_path / "b", *paper, "--resume_from_checkpoint", "last")
    assert all(torch.equal(p, q) for p, q in zip(expected.model.parameters(), resumed.model.parameters(), strict=True))


def test_plain_is_dense_training(tmp_path, capsys):
    trainer = run(tmp_path, "--plain")
    assert trainer.drt is None
    assert "eval loss" in capsys.readouterr().out


def test_it_takes_a_model_and_texts_of_ones_own(tmp_path):
    run(tmp_path / "first", "--plain")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(f"This is text number {i}. " * 60)
    flags = ("--model_name_or_path", str(tmp_path / "first" / "out"), "--dataset", str(texts))
    trainer = run(tmp_path / "second", *flags, "--drt_schedule", "paper")
    assert str(trainer.drt.plan) == "adapter@0 dense@4 adapter@8"  # pretrained weights are not truncated
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "100"], "hidden_size must be a multiple of 64"),
        (["--block_size", "1"], "block_size must be at least 2, got 1"),
        (["--vocab_size", "10"], "vocab_size must be at least 300, got 10"),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--max_texts", "1"], "holds 1 texts; at least 2 are needed"),
        (["--block_size", "10000000"], "less than one block of --block_size 10000000"),
        (["--drt_schedule", "factored@0 dense@120%"], "a boundary in % must lie in"),
        (["--drt_rank_ratio", "4"], r"rank_ratio must be in \(0, 1\], got 4"),
    ],
)
def test_bad_flags_are_refused_with_a_reason(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags)


def test_the_command_to_compare_with_dense_runs(tmp_path, capsys, monkeypatch):
    flags = [*SMALL, "--drt_rank", "8", "--drt_exclude", "q_proj", "k_proj", "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", ["pretrain_clm.py", *flags, "--output_dir", str(tmp_path / "low rank")])
    pretrain_clm.main(["--drt_schedule", "paper", *flags, "--output_dir", str(tmp_path / "low rank")])
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [row[3].strip() for row in rows] == ["8", "full", "8"]
    assert "eff. rank is the mean effective rank of their weights" in out
    (command,) = [line for line in out.splitlines() if line.startswith("Compare with dense: ")]
    first, report = command.removeprefix("Compare with dense: ").split(" && ")
    words = shlex.split(first)
    assert not any(word.startswith("--drt_") for word in words)
    assert pretrain_clm.main(words[2:]).drt is None
    _, _, *folders = shlex.split(report)
    write_page(read_runs(folders), tmp_path / "report.html")
    assert "low rank-dense" in (tmp_path / "report.html").read_text()
