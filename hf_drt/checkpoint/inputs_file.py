"""``drt_inputs.safetensors``: what a run had gathered of layers' inputs, where a checkpoint falls into that time."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_drt.checkpoint.state_file import CheckpointError

INPUTS_NAME = "drt_inputs.safetensors"


def write_inputs(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write them; where there are none, no file."""
    if tensors:
        save_file(dict(tensors), Path(folder) / INPUTS_NAME)


def read_inputs(folder: str | Path) -> dict[str, Tensor]:
    """The tensors, on the CPU.

    Raises:
        CheckpointError: The file is missing, cut short or damaged.
    """
    path, advice = Path(folder) / INPUTS_NAME, "Resume from another checkpoint."
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {advice}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}). {advice}") from None
