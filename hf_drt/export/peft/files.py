"""The two files of a LoRA checkpoint: their names, and what stands in them."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_drt.messages import some

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PAIR_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


def local_folder(folder: str | os.PathLike, revision: str | None) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(os.fspath(folder), revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(folder)} is no folder here, and could not be had from the Hub ({type(error).__name__}: "
            f"{error}). Give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or the name of a repository with them."
        ) from error
    return Path(found)


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "Load adapter_model.bin in PEFT and save it again" if pickled else "Save the adapter again"
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}: the adapter is incomplete. {remedy}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Save the adapter again.") from None


def grouped(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """``(A (r, in), B (out, r))`` by layer, and all other tensors of the file by their name in the model."""
    halves, others = {}, {}
    for key, tensor in tensors.items():
        if match := _PAIR_KEY.fullmatch(key):
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    if not halves:
        raise ValueError(f"{path} holds no LoRA weight ({PREFIX}<layer>.lora_A.weight): there is nothing to load.")
    if torn := [name for name, half in halves.items() if len(half) < 2]:
        raise ValueError(f"{path} is damaged: {some(torn)} has only one of lora_A and lora_B. Save the adapter again.")
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {some(bad)} holds inf or nan; that training has diverged. Use an earlier state.")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}, others
