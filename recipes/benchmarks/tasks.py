"""Model and data of each kind of benchmark task, from a task file's ``model`` and ``data`` sections."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import brown_documents, fashion_mnist, gcide_entries
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    default_data_collator,
)

END, MASK = "<|end|>", "<|mask|>"


@dataclass(frozen=True)
class Task:
    """What a run trains and is judged by.

    Attributes:
        model: Makes a new model; ``set_seed`` comes before.
        train, evaluation: Datasets.
        collate: From samples to a batch.
        metrics: From logits and labels to named numbers, or None where the loss is the metric.
    """

    model: Callable[[], nn.Module]
    train: Any
    evaluation: Any
    collate: Callable[[list], dict[str, Any]] = default_data_collator
    metrics: Callable[[Any], dict[str, float]] | None = None


def build(kind: str, model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """The task of a kind, one of :data:`KINDS`.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return KINDS[kind](dict(model), dict(data), cache)


# ---- text


class Blocks(torch.utils.data.Dataset):
    """Samples of ``size`` tokens, cut from one long array; labels are the tokens."""

    def __init__(self, tokens: np.ndarray, size: int, limit: int | None = None):
        self.rows = torch.from_numpy(tokens[: len(tokens) // size * size].astype(np.int64)).view(-1, size)[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _documents(cache: Path) -> tuple[list[str], list[str]]:
    """Brown and as much of GCIDE again; every twentieth document is held out."""
    brown = brown_documents(cache)
    gcide = gcide_entries(cache)[:: max(1, len(gcide_entries(cache)) // len(brown))]
    documents = [text for pair in zip(brown, gcide, strict=False) for text in pair]
    held_out = documents[::20]
    return [text for i, text in enumerate(documents) if i % 20], held_out


def _tokens(cache: Path, vocab_size: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """A byte-level BPE trained on the training documents, and both splits in its tokens; cached."""
    training, held_out = _documents(cache)
    digest = hashlib.sha256("\n".join([*training, *held_out]).encode()).hexdigest()[:8]
    folder = cache / f"brown-gcide-{vocab_size}-{digest}"
    if not (folder / "evaluation.npy").exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(training, vocab_size=vocab_size, special_tokens=[END, MASK], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, mask_token=MASK)
        tokenizer.save_pretrained(folder)
        for name, texts in (("train", training), ("evaluation", held_out)):
            ids = tokenizer([text + END for text in texts], verbose=False)["input_ids"]
            np.save(folder / f"{name}.npy", np.concatenate([np.array(row, np.uint16) for row in ids]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, np.load(folder / "train.npy"), np.load(folder / "evaluation.npy")


def _causal_lm(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A Llama-shaped language model on Brown and GCIDE."""
    tokenizer, train, evaluation = _tokens(cache, data["vocab_size"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, pad_token_id=None, **model
    )
    size = data["block_size"]
    return Task(
        lambda: AutoModelForCausalLM.from_config(config),
        Blocks(train, size),
        Blocks(evaluation, size, data["eval_blocks"]),
    )


def _masked_lm(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A BERT-shaped encoder that fills in masked tokens of Brown and GCIDE. The masks of the evaluation are fixed."""
    tokenizer, train, evaluation = _tokens(cache, data["vocab_size"])
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **model)
    size, share, mask = data["block_size"], data["mask_share"], tokenizer.mask_token_id

    def masked(rows: torch.Tensor, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        chosen = torch.rand(rows.shape, generator=generator) < share
        return {"input_ids": rows.masked_fill(chosen, mask), "labels": rows.masked_fill(~chosen, -100)}

    fixed = masked(Blocks(evaluation, size, data["eval_blocks"]).rows, torch.Generator().manual_seed(0))
    rows = [{name: column[i] for name, column in fixed.items()} for i in range(len(fixed["labels"]))]

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "labels" in samples[0] and bool((samples[0]["labels"] == -100).any()):  # masked already: evaluation
            return default_data_collator(samples)
        return masked(torch.stack([sample["input_ids"] for sample in samples]), None)

    return Task(lambda: AutoModelForMaskedLM.from_config(config), Blocks(train, size), rows, collate)


# ---- images


class Images(torch.utils.data.Dataset):
    """Fashion-MNIST, normalised to mean 0 and deviation 1 of the training set."""

    MEAN, DEVIATION = 0.2860, 0.3530

    def __init__(self, split: str, limit: int | None):
        images, labels = fashion_mnist(split)
        self.images, self.labels = torch.from_numpy(images[:limit].copy()), torch.from_numpy(labels[:limit].copy())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = (self.images[index][None].float() / 255 - self.MEAN) / self.DEVIATION
        return {"pixel_values": pixels, "labels": self.labels[index].long()}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _image_classifier(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A vision transformer from scratch on Fashion-MNIST."""
    config = ViTConfig(image_size=28, num_channels=1, num_labels=10, **model)
    return Task(
        lambda: AutoModelForImageClassification.from_config(config),
        Images("train", data["train_images"]),
        Images("t10k", data["eval_images"]),
        metrics=accuracy,
    )


KINDS: dict[str, Callable[[dict, dict, Path], Task]] = {
    "causal_lm": _causal_lm,
    "masked_lm": _masked_lm,
    "image_classifier": _image_classifier,
}
