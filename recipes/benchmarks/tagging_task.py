"""An encoder from scratch, BERT or ModernBERT, that names the part of speech of every word of the Brown corpus."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import brown_tagged
from kept import kept
from task import Task
from text_tasks import tokens_of
from transformers import AutoModelForTokenClassification, BertConfig, ModernBertConfig, PreTrainedTokenizerBase

FAMILIES = {"bert": BertConfig, "modernbert": ModernBertConfig}
IGNORED = -100
RAREST = 50  # words of a part of speech; rarer ones are one class together
HELD_OUT = 20  # one document in so many

Document = list[tuple[str, str]]
Samples = list[dict[str, torch.Tensor]]


def tagger(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """The model (``family`` bert or modernbert), its samples of ``block_size`` tokens, and the share of words that are
    tagged right.

    Raises:
        ValueError: There is no such family.
    """
    if (family := model.pop("family", "bert")) not in FAMILIES:
        raise ValueError(f"the family of a tagger must be one of {', '.join(FAMILIES)}, got {family!r}.")
    (train, evaluation), labels = tagged_tokens(cache, data["vocab_size"])
    size = data["block_size"]
    config = FAMILIES[family](vocab_size=data["vocab_size"], pad_token_id=0, num_labels=labels, **model)
    return Task(
        lambda: AutoModelForTokenClassification.from_config(config),
        samples_of(train, size),
        samples_of(evaluation, size)[: data["eval_blocks"]],
        metrics=word_accuracy,
        predict=lambda logits, labels: logits.argmax(-1),
    )


def tagged_tokens(cache: Path, vocab_size: int) -> tuple[list[np.ndarray], int]:
    """Both splits as arrays (2, tokens) of tokens and labels, and how many labels there are; cached, since it takes ten
    seconds."""
    tokenizer = tokens_of(cache, vocab_size)[0]
    path = Path(tokenizer.name_or_path, f"tags-{RAREST}-{HELD_OUT}.npz")
    if not path.exists():
        documents = [[(word, plain_tag(tag)) for word, tag in document] for document in brown_tagged(cache)]
        counts = Counter(tag for document in documents for _, tag in document)
        classes = {tag: i for i, tag in enumerate(sorted(tag for tag, count in counts.items() if count >= RAREST))}
        splits = [d for i, d in enumerate(documents) if i % HELD_OUT], documents[::HELD_OUT]
        train, evaluation = (labelled(split, tokenizer, classes) for split in splits)
        with kept(path) as part:
            np.savez(part, train=train, evaluation=evaluation, labels=len(classes) + 1)
    with np.load(path) as arrays:
        return [arrays["train"], arrays["evaluation"]], int(arrays["labels"])


def plain_tag(tag: str) -> str:
    """A tag of the corpus without what it says beside the part of speech: headline, title, cited, foreign word,
    negation, and the second of two words in one (``ppss+bem`` is ``ppss``)."""
    tag = re.sub(r"-(hl|tl|nc)", "", tag.lower().removeprefix("fw-"))
    return tag.partition("+")[0].rstrip("*") or tag


def labelled(documents: list[Document], tokenizer: PreTrainedTokenizerBase, classes: dict[str, int]) -> np.ndarray:
    """Tokens of all words, and as labels the class at the first token of each word."""
    pieces: dict[str, list[int]] = {}
    ids, labels = [], []
    for document in documents:
        for word, tag in document:
            if word not in pieces:
                pieces[word] = tokenizer(f" {word}")["input_ids"]
            own = pieces[word]
            ids += own
            labels += [classes.get(tag, len(classes)), *[IGNORED] * (len(own) - 1)]
    return np.array([ids, labels], np.int16)


def samples_of(tokens: np.ndarray, size: int) -> Samples:
    """Samples of ``size`` tokens."""
    whole = tokens.shape[1] // size * size
    ids, labels = torch.from_numpy(tokens[:, :whole].astype(np.int64)).view(2, -1, size)
    return [{"input_ids": own, "labels": classes} for own, classes in zip(ids, labels, strict=True)]


def word_accuracy(prediction: Any) -> dict[str, float]:
    """Share of words whose class is right."""
    counted = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions == prediction.label_ids)[counted].mean())}
