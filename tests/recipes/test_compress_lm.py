"""The recipe that compares ways to make a language model smaller: its runs, and its other ways' definitions."""

import copy
import json
import re

import compress_lm
import pytest
import tiny
import torch

from hf_drt import find_targets

WORDS = [" ".join(str((i * 7 + j * j) % 9) for j in range(40)) for i in range(60)]


class Tokenizer:
    """A digit is a token."""

    def __call__(self, text, verbose):
        return {"input_ids": [1 + int(word) for word in text.split()]}


@pytest.fixture
def setting(tmp_path, monkeypatch):
    tiny.llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(compress_lm.AutoTokenizer, "from_pretrained", lambda folder: Tokenizer())
    monkeypatch.setitem(compress_lm.CORPORA, "brown", lambda cache: WORDS)
    return [
        "--output", str(tmp_path / "records.jsonl"), "--model", str(tmp_path / "model"), "--corpora", "brown",
        "--cache_dir", str(tmp_path), "--draws", "0", "--shares", "0.7", "--block", "8", "--calibration_tokens", "64",
        "--evaluation_tokens", "64", "--training_tokens", "64",
    ]  # fmt: skip


def test_a_run_is_resumed_and_its_table_has_a_row_for_each_way(setting, capsys):
    ways = ["dense", "weight", "asvd", "svd_llm", "uniform", "harm", "sequential"]
    compress_lm.main(["run", *setting, "--methods", *ways[:3]])
    assert "[3 of 3]" in capsys.readouterr().out
    compress_lm.main(["run", *setting, "--methods", *ways])
    assert "[4 of 4]" in capsys.readouterr().out
    records = [json.loads(line) for line in open(setting[1])]  # noqa: SIM115
    assert [record["settings"]["method"] for record in records] == ways
    assert all(record["parameters"] <= 0.7 * record["of"] for record in records[1:])
    trials = records[5]["trials"]
    assert min(trials["harm"], trials["uniform"]) == trials[records[5]["allocation"]]
    compress_lm.main(["table", *setting])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ways)
    weight = next(line for line in lines if " weight " in line)
    assert "1.000" in weight.split()


def test_stages_on_the_way_are_recorded_once(setting, capsys, monkeypatch):
    monkeypatch.setattr(compress_lm, "STEPS", 3)
    compress_lm.main(["run", *setting, "--methods", "harm"])
    compress_lm.main(["run", *setting, "--methods", "harm", "fitted", "recovered"])
    records = [json.loads(line) for line in open(setting[1])]  # noqa: SIM115
    assert [record["settings"]["method"] for record in records] == list(compress_lm.STAGES)
    assert len({record["digest"] for record in records}) == 3
    assert len({record["parameters"] for record in records}) == 1
    fitted, recovered = (record["distances"] for record in records[1:])
    assert list(fitted) == ["dense", "compressed", "least squares"]
    assert recovered["compressed"] == pytest.approx(min(fitted["compressed"], fitted["least squares"]), rel=1e-4)
    capsys.readouterr()
    compress_lm.main(["run", *setting, "--methods", "harm", "fitted", "recovered"])
    assert capsys.readouterr().out == ""
    compress_lm.main(["run", *setting, "--methods", "recovered", "--training_tokens", "0"])
    assert "[1 of 1]" in capsys.readouterr().out
    records = [json.loads(line) for line in open(setting[1])]  # noqa: SIM115
    assert [record["settings"].get("training_tokens") for record in records] == [None, None, 64, None]
    compress_lm.main(["table", *setting])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows[1:]] == ["fitted", "harm", "recovered", "recovered+64"]


def test_the_documents_of_evaluation_are_none_of_calibration():
    documents = [str(i % 9) + f" {i // 9}" * 7 for i in range(60)]
    parts = compress_lm.drawn(documents, _Whole(), 0, (64, 64, 64), 8)
    seen = [{row[0].item() for batch in part for row in batch["input_ids"]} for part in parts]
    assert len(set().union(*seen)) == sum(map(len, seen)) == 24
    assert compress_lm.drawn(documents, _Whole(), 0, (64, 0), 8)[1] == []
    with pytest.raises(ValueError, match=r"the corpus has no 1,000 tokens left\. Ask for fewer"):
        compress_lm.drawn(documents, _Whole(), 0, (64, 1000), 8)


class _Whole:
    """Eight tokens of each document, the first of which tells it from all others."""

    def __call__(self, text, verbose):
        first, *rest = text.split()
        return {"input_ids": [int(first) + 9 * int(rest[0])] + [1] * 7}


def test_the_other_ways_minimise_what_they_say():
    model = tiny.llama().eval()
    batches = [tiny.batch(rows=32)]
    name = "model.layers.0.mlp.down_proj"
    W, seen = find_targets(model).targets[name].weight.detach().clone(), []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(**batches[0])
    handle.remove()
    errors = {}
    for way in ("svd_llm", "asvd", "weight"):
        twin = copy.deepcopy(model)
        if way == "weight":
            U, s, Vh = torch.linalg.svd(W, full_matrices=False)
            D = W - (U[:, :14] * s[:14]) @ Vh[:14]
        else:
            compress_lm.METHODS[way](twin, 0.7, batches)
            D = W - twin.get_submodule(name).weight
        scale = seen[0].abs().mean(0).sqrt()
        errors[way] = [float((seen[0] @ D.T).norm()), float((D * scale).norm()), float(D.norm())]
    best = [min(errors, key=lambda way: errors[way][i]) for i in range(3)]
    assert best == ["svd_llm", "asvd", "weight"]


def test_eight_bits_are_a_quarter_of_the_bytes():
    pytest.importorskip("torchao")
    model, batches = tiny.llama().eval(), [tiny.batch()]
    before = compress_lm.loss_on(model, batches)
    told = compress_lm.int8(model, 0.0, batches)
    assert told["parameters"] == 20480 // 4
    assert compress_lm.loss_on(model, batches) == pytest.approx(before, abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "1.2"], r"--shares must lie in \(0, 1\), got 1\.2"),
        (["--block", "1"], "--block must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compress_lm.main(["run", *arguments])
    assert re.search(message, capsys.readouterr().err)
