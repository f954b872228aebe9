"""``hf-drt compress``: a folder of a trained model, and texts, to a folder of a smaller one."""

import json
import sys

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_drt.compress import compress, loss_curve
from hf_drt.forms import Dense, Factored, form_of
from hf_drt.recovery import compress_and_recover

WORDS = " ".join(f"w{(i * i + i // 7) % tiny.VOCAB}" for i in range(600))


@pytest.fixture
def source(tmp_path):
    """A small Llama, its tokenizer, and texts."""
    folder = tmp_path / "model"
    tiny.llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    (tmp_path / "texts.txt").write_text(WORDS)
    return folder


def short(folder, target, *flags):
    return ("compress", folder, target, "--samples", "8", "--length", "16", *flags)


def token_pairs(samples=8, length=16):
    """The texts as the command reads them: samples, as many as there are, and batches of two."""
    ids = torch.tensor([int(word[1:]) for word in WORDS.split()])
    ids = ids[: len(ids) // length * length].view(-1, length)[:samples]
    return ids, [{"input_ids": pair} for pair in ids.split(2)]


def mean_loss(model):
    return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in token_pairs()[1]) / 4


def test_it_does_what_the_function_does_on_the_same_tokens(hf_drt, source, tmp_path):
    texts = ("--calibration", tmp_path / "texts.txt", "--evaluation", tmp_path / "texts.txt")
    result = hf_drt(*short(source, tmp_path / "small", "--parameters", "0.6", *texts))
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(source)
    ids, batches = token_pairs()
    expected = compress(model, parameters=0.6, calibration=batches, evaluate=mean_loss)
    assert str(expected) in result.out
    assert f"written to {tmp_path / 'small'} as native" in result.out
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(written, {"input_ids": ids}), tiny.logits(model.eval(), {"input_ids": ids}))
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert result.err == ""


def test_recovery_does_what_the_function_does(hf_drt, source, tmp_path):
    texts = ("--calibration", tmp_path / "texts.txt", "--evaluation", tmp_path / "texts.txt")
    flags = (*texts, "--parameters", "0.6", "--recover-steps", "5")
    result = hf_drt(*short(source, tmp_path / "small", *flags))
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(source)
    batches, more = token_pairs()[1], token_pairs(18)[1][4:]
    options = {"training": more}
    expected = compress_and_recover(
        model, parameters=0.6, calibration=batches, recover_steps=5, recover_options=options, evaluate=mean_loss
    )
    assert str(expected.compression) in result.out
    assert f"recovered {expected.losses[2]:.4f}" in result.out
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(written, batches[0]), tiny.logits(model.eval(), batches[0]))
    told = json.loads(hf_drt(*short(source, tmp_path / "again", *flags, "--json")).out)
    assert told["recovery"]["losses"] == pytest.approx(expected.losses)
    assert told["recovery"]["stages"][0]["name"] == "dense"
    assert [layer["name"] for layer in told["recovery"]["layers"]] == [layer.name for layer in expected.layers]
    half = hf_drt(*short(source, tmp_path / "half", *flags, "--recover-dtype", "bf16"))
    assert half.code == 0, half.err


def test_the_curve_is_drawn_and_told(hf_drt, source, tmp_path):
    pytest.importorskip("matplotlib")
    texts = ("--calibration", tmp_path / "texts.txt", "--evaluation", tmp_path / "texts.txt")
    flags = (*texts, "--parameters", "0.75", "--recover-steps", "2", "--curve")
    result = hf_drt(*short(source, tmp_path / "small", *flags, tmp_path / "curve.svg"))
    assert result.code == 0, result.err
    model, (_, batches) = AutoModelForCausalLM.from_pretrained(source), token_pairs()
    expected = loss_curve(model, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.75], batches, evaluation=batches)
    assert f"loss by budget, before any recovery\n{expected}" in result.out
    assert "<!-- recovered -->" in (tmp_path / "curve.svg").read_text()
    told = json.loads(hf_drt(*short(source, tmp_path / "again", *flags, tmp_path / "again.png", "--json")).out)
    assert [point["share"] for point in told["curve"]] == [1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5]  # 0.4 is too small


def test_a_recovery_trains_on_text_beyond_the_calibration(hf_drt, source, tmp_path):
    flags = ("--parameters", "0.6", "--recover-steps", "3", "--evaluation", tmp_path / "texts.txt")
    command = ("compress", source, tmp_path / "small", "--calibration", tmp_path / "texts.txt", "--length", "4")
    result = hf_drt(*command, "--samples", "3", *flags)
    assert result.code == 0, result.err
    model, more = AutoModelForCausalLM.from_pretrained(source), token_pairs(10, 4)[1][2:]
    compress_and_recover(
        model,
        parameters=0.6,
        calibration=token_pairs(3, 4)[1],
        recover_steps=3,
        recover_options={"training": more},
    )
    written, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "small"), token_pairs()[1][0]
    assert torch.equal(tiny.logits(written, ids), tiny.logits(model.eval(), ids))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--curve", "curve.svg"), "--curve: is of budgets: give --parameters and --calibration."),
        (
            ("--curve", "nowhere/curve.svg", "--parameters", "0.6", "--calibration", "TEXTS"),
            "--curve: there is no folder nowhere. Make it first.",
        ),
        (
            ("--curve", "curve.txt", "--parameters", "0.6", "--calibration", "TEXTS"),
            "--curve: must end in one of .svg, .png, .pdf, got 'curve.txt'.",
        ),
        (("--recover-steps", "5"), "--recover-steps: needs --calibration, texts to recover on."),
        (("--recover-dtype", "bf16"), "--recover-dtype: has no effect without updates. Give --recover-steps."),
        (
            ("--recover-steps", "5", "--calibration", "TEXTS", "--recover-dtype", "fp8"),
            "--recover-dtype: must be one of fp32, bf16, got 'fp8'.",
        ),
    ],
)
def test_flags_of_a_recovery_that_do_not_go_together(hf_drt, source, tmp_path, flags, message):
    flags = [tmp_path / "texts.txt" if flag == "TEXTS" else flag for flag in flags]
    result = hf_drt(*short(source, tmp_path / "small", "--rank", "4", *flags))
    assert (result.code, message in " ".join(result.err.split())) == (2, True), result.err
    assert not (tmp_path / "small").exists()


def test_without_calibration_it_warns_and_says_what_to_expect(hf_drt, source, tmp_path):
    result = hf_drt("compress", source, tmp_path / "small", "--rank", "4", "--format", "dense", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["criterion"] == "rank=4"
    assert "expect a model that has to be trained again" in told["warning"]
    assert told["warning"].endswith("Give --calibration.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    W = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(W.float()) == 4
    plain = hf_drt("compress", source, tmp_path / "plain", "--rank", "4")
    assert plain.err.startswith("warning: ")


def test_rows_of_other_models_have_labels_and_lengths_of_their_own(hf_drt, source, tmp_path):
    folder = tmp_path / "classifier"
    BertForSequenceClassification(tiny.bert().config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    rows = [{"text": " ".join(WORDS.split()[i : i + 3 + i % 5]), "label": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    for texts in ("rows.jsonl", "rows"):
        flags = ("--calibration", tmp_path / texts, "--evaluation", tmp_path / texts, "--parameters", "0.7", "--json")
        result = hf_drt(*short(folder, tmp_path / f"small-{texts}", *flags))
        assert result.code == 0, result.err
        told = json.loads(result.out)
        assert [trial["allocation"] for trial in told["trials"]] == ["dense", "harm", "uniform"]
        assert told["loss"][0] > 0
    unlabelled = [{"text": row["text"]} for row in rows]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    flags = ("--evaluation", tmp_path / "plain.jsonl", "--parameters", "0.7")
    result = hf_drt(*short(folder, tmp_path / "none", *flags))
    assert (result.code, "--evaluation give no loss: they have no 'label'" in result.err) == (1, True), result.err
    assert not (tmp_path / "none").exists()


def test_layers_are_chosen_by_patterns(hf_drt, source, tmp_path):
    flags = ("--rank", "4", "--include", "mlp", "--exclude", "down_proj$")
    assert hf_drt("compress", source, tmp_path / "small", *flags).code == 0
    block = AutoModelForCausalLM.from_pretrained(tmp_path / "small").model.layers[0]
    layers = (block.mlp.up_proj, block.mlp.down_proj, block.self_attn.q_proj)
    assert [form_of(layer) for layer in layers] == [Factored(4), Dense(), Dense()]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--rank", "4", "--format", "gguf"), 2, "must be one of native, dense, linear-pairs, got 'gguf'"),
        ((), 1, "give exactly one of rank, rank_ratio, energy, parameters; got none"),
        (("--rank", "4", "--parameters", "0.5"), 1, "got rank and parameters"),
        (("--parameters", "1.5"), 1, "parameters must be a share"),
        (("--parameters", "0.5", "--allocation", "harm"), 1, "needs calibration batches"),
        (("--parameters", "0.5", "--calibration", "nowhere.csv"), 1, "no texts can be read from nowhere.csv"),
        (("--parameters", "0.5", "--calibration", "{}/texts.csv"), 1, "is neither a .txt nor a .jsonl file"),
        (("--parameters", "0.5", "--calibration", "{}/bad.jsonl"), 1, "line 2 of"),
        (("--parameters", "0.5", "--calibration", "{}/keys.jsonl"), 1, "row 1 of"),
        (("--parameters", "0.5", "--calibration", "{}/few.txt"), 1, "fewer than 16 tokens of text"),
    ],
)
def test_it_refuses(hf_drt, source, tmp_path, flags, code, message):
    for name, text in (
        ("texts.csv", WORDS), ("bad.jsonl", '{"text": "w1"}\nw2'), ("keys.jsonl", '{"words": "w1"}'),
        ("few.txt", "w1 w2"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    result = hf_drt(*short(source, tmp_path / "small", *(flag.format(tmp_path) for flag in flags)))
    assert (result.code, message in result.err) == (code, True), result.err
    assert not (tmp_path / "small").exists()


def test_a_model_without_a_tokenizer_and_a_full_folder_are_refused(hf_drt, source, tmp_path):
    flags = ("--parameters", "0.5", "--calibration", tmp_path / "texts.txt")
    full = hf_drt(*short(source, source, *flags))
    assert (full.code, "exists and is not an empty folder" in full.err) == (1, True)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    result = hf_drt(*short(source, tmp_path / "small", *flags))
    assert (result.code, "texts are for models with a tokenizer" in result.err) == (1, True), result.err


def test_without_datasets_it_reads_files_alone(hf_drt, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = hf_drt(*short(source, tmp_path / "small", "--parameters", "0.5", "--calibration", "someone/texts"))
    assert (result.code, "someone/texts is no file, and datasets, which reads others" in result.err) == (1, True)
    texts = ("--calibration", tmp_path / "texts.txt")
    assert hf_drt(*short(source, tmp_path / "small", "--parameters", "0.5", *texts)).code == 0
