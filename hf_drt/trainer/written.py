"""What has landed in a folder after a model was written there: is it in the form that was asked for?"""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from hf_drt.checkpoint import METHOD, CheckpointError
from hf_drt.config import Export
from hf_drt.engines import is_sharded
from hf_drt.export import dense_weight, low_rank_layers
from hf_drt.forms import LowRankLinear

logger = logging.getLogger(__name__)

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_written(folder: Path, model: nn.Module, export: Export, since: float) -> None:
    """Compare the weights that were written with the model.

    A dense model has no low-rank tensor, and the one layer that is read back has the effective W of the model's; a
    native one has the low-rank tensors of all layers, and a ``config.json`` that declares them. Of an adapter the base
    is looked at, which is dense.

    Args:
        folder: Where to; subfolders too, but those of checkpoints.
        model: Unwrapped, in the form that it is in.
        export: The form that was asked for.
        since: Files that are older (in seconds since the epoch) are not looked at.

    Raises:
        CheckpointError: What has landed is of another form, or of other values.
    """
    layers = dict(low_rank_layers(model))
    if not layers:
        return
    tensors = _stored(folder, since)
    if not tensors:
        logger.warning("%s: no weights were found there, so it was not checked whether they are %s.", folder, export)
    elif export == "native":
        _check_native(folder, tensors, layers)
    else:
        _check_dense(folder, tensors, layers, sharded=is_sharded(model) or export == "adapter")


def _check_dense(folder: Path, tensors: dict[str, Any], layers: dict[str, LowRankLinear], sharded: bool) -> None:
    for name, layer in layers.items():
        for tensor in layer.tensors:
            if found := _found(f"{name}.{tensor}", tensors):
                raise CheckpointError(
                    f"{folder} should hold a dense model, but has {found}: the trainer has written low-rank tensors. "
                    "Call trainer.drt.to_dense() before saving, or use export=native."
                )
    name, layer = next(iter(layers.items()))
    found = _found(layer.dense_key(name), tensors)
    if found is None or sharded:  # under an architecture's published name, or in a file of many layers
        return
    stored, expected = tensors[found].load(found), dense_weight(layer).cpu()
    if stored.dtype == expected.dtype and not torch.equal(stored, expected):
        raise CheckpointError(
            f"{found} in {folder} is not what the model computes with: the trainer has written other weights than "
            "those of its model. Call trainer.drt.to_dense(), and save the model by model.save_pretrained()."
        )


def _check_native(folder: Path, tensors: dict[str, Any], layers: dict[str, LowRankLinear]) -> None:
    lost = [
        f"{name}.{t}" for name, layer in layers.items() for t in layer.tensors if not _found(f"{name}.{t}", tensors)
    ]
    if not lost and any(_declares(path) for path in {file.path.parent / CONFIG_NAME for file in tensors.values()}):
        return
    what = f"lacks {lost[0]}" if lost else f"has no {CONFIG_NAME} that declares the low-rank layers"
    raise CheckpointError(
        f"{folder} should hold a native model, but {what}: nothing could load it. The trainer writes its models in a "
        "way of its own; use export=dense."
    )


def _declares(path: Path) -> bool:
    try:
        return json.loads(path.read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _found(name: str, tensors: dict[str, Any]) -> str | None:
    """The stored name of a tensor: its own, or what is left of it inside a container's part, or with a wrapper's
    prefix."""
    parts = name.split(".")
    names = (".".join(parts[start:]) for start in range(len(parts) - 2))
    return next((own for own in names if own in tensors), None)


class _File:
    """A file of weights that was written."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Of its tensors; none where it is something else."""
        if self.path.suffix == ".safetensors":
            try:
                with safe_open(self.path, framework="pt") as file:
                    return list(file.keys())
            except SafetensorError:
                return []
        return list(self._pickled())

    def load(self, name: str) -> Tensor:
        """One tensor."""
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        return self._pickled()[name]

    def _pickled(self) -> dict[str, Tensor]:
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):  # no state dict
            return {}
        return {k: v for k, v in value.items() if torch.is_tensor(v)} if isinstance(value, dict) else {}


def _stored(folder: Path, since: float) -> dict[str, _File]:
    """The files that were written, by the names of their tensors."""
    paths = (path for pattern in _PATTERNS for path in folder.rglob(pattern))
    fresh = (
        path
        for path in paths
        if not any(part.startswith((PREFIX_CHECKPOINT_DIR, ".")) for part in path.relative_to(folder).parts)
        and path.stat().st_mtime >= since - 2  # file systems round
    )
    return {name: file for file in map(_File, fresh) for name in file.names()}
