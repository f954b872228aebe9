"""Pretrained models that come as Python packages: MiniLM on movie snippets, SmolLM2 on the Brown corpus."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import finetune_classifier
import numpy as np
import torch
from corpora import brown_documents
from kept import kept
from task import Task
from text_tasks import Blocks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding

SMOLLM2 = "smollm2-135m"


def text_classifier(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """MiniLM with a new head, to tell favourable from unfavourable sentences of film reviews.

    Every batch is as long as ``data["max_length"]``, so that all update steps cost the same.
    """
    _check("model", model, {"freeze"})
    recipe = finetune_classifier.RecipeArguments(cache_dir=str(cache), **data)
    tokenizer = AutoTokenizer.from_pretrained(finetune_classifier.packaged_minilm())
    splits = finetune_classifier.load_data(recipe, tokenizer).remove_columns("length")
    return Task(
        lambda: frozen(finetune_classifier.load_model(None)[0], model.get("freeze")),
        splits["train"],
        splits["test"],
        DataCollatorWithPadding(tokenizer, padding="max_length", max_length=recipe.max_length),
        finetune_classifier.accuracy,
    )


def pretrained_lm(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """SmolLM2 (135 million parameters), in the ``dtype`` of the section ``model``, goes on training on Brown."""
    _check("model", model, {"dtype", "freeze"})
    dtype = model.get("dtype", "float32")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"the section model: dtype must be float32 or bfloat16, got {dtype!r}.")
    folder = smollm2(cache)
    train, evaluation = _brown_tokens(cache, folder)
    size = data["block_size"]
    return Task(
        lambda: frozen(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), model.get("freeze")),
        Blocks(train, size),
        Blocks(evaluation, size, data["eval_blocks"]),
    )


def frozen(model: nn.Module, pattern: str | None) -> nn.Module:
    """The model; of its parameters those whose names match the pattern (``re.search``) are not trained.

    Raises:
        ValueError: The pattern matches none.
    """
    if pattern is not None:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"freeze={pattern!r} matches no parameter of {type(model).__name__}.")
        for parameter in found:
            parameter.requires_grad_(False)
    return model


def smollm2(cache: Path) -> Path:
    """Folder of the model in float32. It is converted once, by another process, whose memory is not the run's."""
    folder = cache / SMOLLM2
    if not (folder / "model.safetensors").exists():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_convert, folder).result()
    return folder


def _convert(folder: Path) -> None:
    from finetune_sft import packaged_smollm2

    model, tokenizer = packaged_smollm2()
    with kept(folder) as part:
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)


def _brown_tokens(cache: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of Brown; every twentieth document is held out."""
    path = cache / f"brown-{folder.name}.npz"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documents = brown_documents(cache)
        ids = [np.array(row, np.uint16) for row in tokenizer(documents, verbose=False)["input_ids"]]
        held_out = np.concatenate(ids[::20])
        with kept(path) as part:
            np.savez(part, train=np.concatenate([row for i, row in enumerate(ids) if i % 20]), evaluation=held_out)
    with np.load(path) as tokens:
        return tokens["train"], tokens["evaluation"]


def _check(what: str, section: dict[str, Any], allowed: set[str]) -> None:
    if unknown := set(section) - allowed:
        raise ValueError(
            f"the section {what} of a pretrained task has unknown entries: {', '.join(sorted(unknown))}; it may have "
            f"{', '.join(sorted(allowed))}."
        )
