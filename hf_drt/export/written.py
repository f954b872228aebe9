"""What has landed in a folder after a model was written there."""

import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


class Written:
    """The weights in a folder and its subfolders, but those of checkpoints.

    Args:
        folder: Where to look.
        since: Files that are older (in seconds since the epoch) are not looked at.

    Attributes:
        folders: Those that hold weights.
    """

    def __init__(self, folder: Path, since: float):
        self.folder = folder
        self._tensors = _stored(folder, since)
        self.folders = {file.path.parent for file in self._tensors.values()}

    @property
    def is_empty(self) -> bool:
        return not self._tensors

    def say_unchecked(self, export: str) -> None:
        """Log that there is nothing to compare."""
        logger.warning(
            "%s: no weights were found there, so it was not checked whether they are %s.", self.folder, export
        )

    def find(self, name: str) -> str | None:
        """The stored name of a tensor: its own, or what is left of it inside a container's part, or with a wrapper's
        prefix."""
        parts = name.split(".")
        names = (".".join(parts[start:]) for start in range(len(parts) - 2))
        return next((own for own in names if own in self._tensors), None)

    def load(self, name: str) -> Tensor:
        """A tensor by its stored name."""
        return self._tensors[name].load(name)


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
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # not on import: see native/quantizer.py

    paths = (path for pattern in _PATTERNS for path in folder.rglob(pattern))
    fresh = (
        path
        for path in paths
        if not any(part.startswith((PREFIX_CHECKPOINT_DIR, ".")) for part in path.relative_to(folder).parts)
        and path.stat().st_mtime >= since - 2  # file systems round
    )
    return {name: file for file in map(_File, fresh) for name in file.names()}
