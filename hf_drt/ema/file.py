"""``drt_ema.safetensors``: an average in a checkpoint folder."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_drt.checkpoint import CheckpointError
from hf_drt.ema.average import EMA

AVERAGE_NAME = "drt_ema.safetensors"
FORMAT_VERSION = 1
_HEAD = "hf_drt_ema"


def write_average(folder: str | os.PathLike, ema: EMA) -> Path:
    """Write an average atomically, with its number of updates and its decay."""
    state, path = ema.state_dict(), Path(folder) / AVERAGE_NAME
    head = {"format_version": FORMAT_VERSION, "updates": state["updates"], "decay": asdict(ema.decay)}
    handle, draft = tempfile.mkstemp(dir=folder, prefix=f".{AVERAGE_NAME}.")
    os.close(handle)
    try:
        save_file(state["averages"], draft, metadata={_HEAD: json.dumps(head), "format": "pt"})
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return path


def read_average(folder: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a folder, for :meth:`hf_drt.EMA.load_state_dict`, and the settings of its ``decay``.

    Raises:
        CheckpointError: There is none, it is damaged, or of a newer format.
    """
    path = Path(folder) / AVERAGE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {AVERAGE_NAME}: it was written without an average. Go on without one, or from another "
            "checkpoint; a new average can only begin with a new run."
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            head = json.loads(file.metadata()[_HEAD])
            version, updates, decay = head["format_version"], head["updates"], head["decay"]
            averages = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}). Use another checkpoint.") from None
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this hf_drt reads up to {FORMAT_VERSION}. Upgrade it."
        )
    return {"updates": updates, "averages": averages, "decay": decay}
