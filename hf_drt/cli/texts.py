"""Batches of a model from a file of texts, or a data set of the Hub: what a compression is calibrated on."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

_GIVE = "Give a .txt file, a .jsonl file of lines with a 'text', a folder of datasets' save_to_disk, or a data set."
Row = dict[str, Any]


def text_batches(source: str, folder: Path, causal: bool, samples: int, length: int, rows: int) -> list[Row]:
    """Batches for the model of a folder, by its own tokenizer.

    A causal language model gets all texts in a row, cut into samples of ``length`` tokens each. Any other gets a sample
    of each text, cut at ``length`` and padded, with its label where it has one.

    Args:
        source: Of the texts.
        folder: Where the tokenizer lies.
        samples, length: So many at most, and tokens of each.
        rows: Samples of a batch.

    Raises:
        ValueError: There is no such source, it holds no text, or the model has no tokenizer.
    """
    texts = read_texts(source)
    tokenizer = _tokenizer(folder)
    made = _joined(texts, tokenizer, samples, length) if causal else _separate(texts, tokenizer, samples, length)
    if not made:
        what = f"fewer than {length} tokens of text, the --length of a sample" if causal else "no text"
        raise ValueError(f"{source} holds {what}. {_GIVE}")
    return [_batch(made[first : first + rows], tokenizer) for first in range(0, len(made), rows)]


def read_texts(source: str) -> Iterator[Row]:
    """Rows with a ``text``, and perhaps a ``label``; of a .txt file one, whole.

    Raises:
        ValueError: There is no such source, or a row without a text.
    """
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        yield {"text": path.read_text(encoding="utf-8")}
        return
    for number, row in enumerate(_lines(path) if path.is_file() else _data_set(source), 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"row {number} of {source} has no 'text' that is a string. {_GIVE}")
        yield row


def _lines(path: Path) -> Iterator[Any]:
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} is neither a .txt nor a .jsonl file. {_GIVE}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(f"line {number} of {path} is not JSON. {_GIVE}") from None


def _data_set(source: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} is no file, and datasets, which reads others, is not installed. {_GIVE}") from None
    try:
        found = datasets.load_from_disk(source) if Path(source).is_dir() else datasets.load_dataset(source)
    except Exception as error:  # those of the Hub's client are of many kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no texts can be read from {source} ({first}). {_GIVE}") from None
    yield from found["train"] if isinstance(found, dict) and "train" in found else found


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, ImportError, by what is missing
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"texts are for models with a tokenizer, and {folder} has none that loads ({first}). Save it beside the "
            "weights, or call hf_drt.compress in Python with batches of your own."
        ) from None


def _joined(texts: Iterator[Row], tokenizer: Any, samples: int, length: int) -> list[Row]:
    ids: list[int] = []
    for row in texts:
        ids += tokenizer(row["text"])["input_ids"]
        if len(ids) >= samples * length:
            break
    count = min(len(ids) // length, samples)
    return [{"input_ids": ids[first * length : (first + 1) * length]} for first in range(count)]


def _separate(texts: Iterator[Row], tokenizer: Any, samples: int, length: int) -> list[Row]:
    rows = list(islice(texts, samples))
    samples_made = [dict(tokenizer(row["text"], truncation=True, max_length=length)) for row in rows]
    labels = [next((row[name] for name in ("labels", "label") if name in row), None) for row in rows]
    if all(isinstance(label, (int, float)) for label in labels):
        return [sample | {"labels": label} for sample, label in zip(samples_made, labels, strict=True)]
    return samples_made


def _batch(samples: list[Row], tokenizer: Any) -> dict[str, Tensor]:
    if len({len(sample["input_ids"]) for sample in samples}) == 1:
        return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}
    return dict(tokenizer.pad(samples, return_tensors="pt"))
