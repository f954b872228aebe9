"""The safetensors files of a checkpoint folder, read by their headers: names and shapes without a weight."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_drt.checkpoint.state_file import CheckpointError

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_BROKEN_JSON = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError)

Shapes = dict[str, tuple[int, ...]]


def weight_files(folder: Path, advice: str) -> list[Path]:
    """As the Trainer does, the single file where there is one, or where there is no index, and the index's shards
    otherwise; whether they exist is not looked at.

    Raises:
        CheckpointError: The index is damaged; ``advice`` ends the message, as below.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except _BROKEN_JSON:
        raise CheckpointError(f"{index} is damaged. {advice}") from None


def shapes_by_file(paths: Iterable[str | Path], advice: str) -> dict[Path, Shapes]:
    """Shapes of all tensors in safetensors files, by file.

    Raises:
        CheckpointError: A file is missing, cut short or damaged.
    """
    return {Path(path): _shapes(Path(path), advice) for path in paths}


def stored_shapes(paths: Iterable[str | Path], advice: str) -> Shapes:
    """The same of all files together."""
    return {key: shape for shapes in shapes_by_file(paths, advice).values() for key, shape in shapes.items()}


def _shapes(path: Path, advice: str) -> Shapes:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {advice}")
    try:
        with safe_open(path, framework="pt") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}). {advice}") from None
