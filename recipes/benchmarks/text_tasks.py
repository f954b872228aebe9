"""Language models from scratch, on the Brown corpus and the GCIDE dictionary."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import brown_documents, gcide_entries
from kept import kept
from minimal_pairs import minimal_pairs, share_right
from task import Task
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    default_data_collator,
)

END, MASK = "<|end|>", "<|mask|>"


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


def tokens_of(cache: Path, vocab_size: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """A byte-level BPE trained on the training documents, and both splits in its tokens; cached."""
    training, held_out = _documents(cache)
    digest = hashlib.sha256("\n".join([*training, *held_out]).encode()).hexdigest()[:8]
    folder = cache / f"brown-gcide-{vocab_size}-{digest}"
    if not (folder / "evaluation.npy").exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(training, vocab_size=vocab_size, special_tokens=[END, MASK], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, mask_token=MASK)
        with kept(folder) as part:
            tokenizer.save_pretrained(part)
            for name, texts in (("train", training), ("evaluation", held_out)):
                ids = tokenizer([text + END for text in texts], verbose=False)["input_ids"]
                np.save(part / f"{name}.npy", np.concatenate([np.array(row, np.uint16) for row in ids]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, np.load(folder / "train.npy"), np.load(folder / "evaluation.npy")


def causal_lm(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A Llama-shaped language model on Brown and GCIDE; with ``train_blocks`` in ``data`` the training set is cut to so
    many samples, which a long run then passes over more than once."""
    tokenizer, train, evaluation = tokens_of(cache, data["vocab_size"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, pad_token_id=None, **model
    )
    size = data["block_size"]
    pairs = minimal_pairs(_documents(cache)[1], data["pairs"]) if "pairs" in data else []
    return Task(
        lambda: AutoModelForCausalLM.from_config(config),
        Blocks(train, size, data.get("train_blocks")),
        Blocks(evaluation, size, data["eval_blocks"]),
        metrics=next_token_accuracy,
        predict=lambda logits, labels: logits.argmax(-1),
        probe=(lambda model: {"minimal_pairs": share_right(model, tokenizer, pairs)}) if pairs else None,
    )


def next_token_accuracy(prediction: Any) -> dict[str, float]:
    """Share of tokens that are the most likely ones after those before them."""
    return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def masked_lm(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A BERT-shaped encoder that fills in masked tokens of Brown and GCIDE. The masks of the evaluation are fixed."""
    tokenizer, train, evaluation = tokens_of(cache, data["vocab_size"])
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
