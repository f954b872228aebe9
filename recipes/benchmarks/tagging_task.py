"""An encoder from scratch, BERT or ModernBERT, that names the part of speech of every word of the Brown corpus."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from corpora import brown_tagged
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
    tokenizer = tokens_of(cache, data["vocab_size"])[0]
    documents = [[(word, plain_tag(tag)) for word, tag in document] for document in brown_tagged(cache)]
    counts = Counter(tag for document in documents for _, tag in document)
    classes = {tag: i for i, tag in enumerate(sorted(tag for tag, count in counts.items() if count >= RAREST))}
    size = data["block_size"]
    training = [document for i, document in enumerate(documents) if i % HELD_OUT]
    config = FAMILIES[family](vocab_size=len(tokenizer), pad_token_id=0, num_labels=len(classes) + 1, **model)
    return Task(
        lambda: AutoModelForTokenClassification.from_config(config),
        samples_of(training, tokenizer, classes, size),
        samples_of(documents[::HELD_OUT], tokenizer, classes, size)[: data["eval_blocks"]],
        metrics=word_accuracy,
        predict=lambda logits, labels: logits.argmax(-1),
    )


def plain_tag(tag: str) -> str:
    """A tag of the corpus without what it says beside the part of speech: headline, title, cited, foreign word,
    negation, and the second of two words in one (``ppss+bem`` is ``ppss``)."""
    tag = re.sub(r"-(hl|tl|nc)", "", tag.lower().removeprefix("fw-"))
    return tag.partition("+")[0].rstrip("*") or tag


def samples_of(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, classes: dict[str, int], size: int
) -> Samples:
    """Tokens of all words in samples of ``size``, and as labels the class at the first token of each word."""
    pieces: dict[str, list[int]] = {}
    ids, labels = [], []
    for document in documents:
        for word, tag in document:
            if word not in pieces:
                pieces[word] = tokenizer(f" {word}")["input_ids"]
            own = pieces[word]
            ids += own
            labels += [classes.get(tag, len(classes)), *[IGNORED] * (len(own) - 1)]
    whole = len(ids) // size * size
    rows = (torch.tensor(column[:whole]).view(-1, size) for column in (ids, labels))
    return [{"input_ids": own, "labels": classes} for own, classes in zip(*rows, strict=True)]


def word_accuracy(prediction: Any) -> dict[str, float]:
    """Share of words whose class is right."""
    counted = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions == prediction.label_ids)[counted].mean())}
