"""``drt_state.json``: the structure of a checkpoint, in a file of its own. Standard library only."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

STATE_NAME = "drt_state.json"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint does not fit this run, or is incomplete. Raised before a weight is touched."""


def write_state(folder: str | os.PathLike, state: dict[str, Any]) -> Path:
    """Write the state atomically: under another name first, flushed to disk, then renamed. A write that fails leaves
    an earlier state as it was, and nothing else."""
    path = Path(folder) / STATE_NAME
    text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{STATE_NAME}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)  # made above, under a name that was free
            raise
    return path


def read_state(folder: str | os.PathLike) -> dict[str, Any]:
    """Read and check the form of a state.

    Raises:
        CheckpointError: There is no such file, it is no JSON object, or it is of a newer format.
    """
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_NAME}: it was not written by dynamic-rank training, or not completely. "
            "Resume from another checkpoint; to start dynamic-rank training on these weights, load them with "
            "from_pretrained and train without resume_from_checkpoint."
        )
    try:
        state = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Resume from another checkpoint.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object). Resume from another checkpoint.")
    version = state.pop("format_version", None)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} has format version {version!r}: it is damaged. Resume from another checkpoint.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this hf_drt reads 1 to {FORMAT_VERSION}. Upgrade hf_drt."
        )
    return state
