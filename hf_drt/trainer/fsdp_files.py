"""The files that Accelerate writes under FSDP in place of ``model.safetensors`` and ``optimizer.pt``."""

import pickle
import zipfile
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME

from hf_drt.checkpoint import CheckpointError

_METADATA = ".metadata"  # written last, once every process has written its shards


def is_fsdp_checkpoint(folder: Path) -> bool:
    """Whether the checkpoint, or what there is of it, was written under FSDP."""
    return any(folder.glob(f"{FSDP_MODEL_NAME}*"))


def check_fsdp_files(folder: Path) -> None:
    """Weights and optimizer are there and whole, in one file each (FULL_STATE_DICT) or in shards.

    Raises:
        CheckpointError: Names what is missing or cut short.
    """
    whole = (folder / f"{FSDP_MODEL_NAME}.bin").exists()
    for name in (FSDP_MODEL_NAME, OPTIMIZER_NAME):
        path = folder / f"{name}.bin" if whole else folder / f"{name}_0" / _METADATA
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. Resume from another checkpoint.")
        if whole and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged. Resume from another checkpoint.")
        if not whole:
            _check_shards(path.parent)


def _check_shards(folder: Path) -> None:
    """Each file reaches as far as the metadata says: the disk of a process' own node may have lost what it wrote."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # it is loaded under FSDP, and slow to load

    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / _METADATA} is cut short or damaged ({error}). Resume from another checkpoint."
        ) from None
    ends: dict[str, int] = {}
    for part in (stored or {}).values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < end:
            what = "is cut short" if path.is_file() else "is missing"
            raise CheckpointError(f"{path} {what}: the checkpoint is incomplete. Resume from another checkpoint.")


def check_engine(folder: Path, fsdp: bool) -> None:
    """A checkpoint written under FSDP resumes under FSDP, and any other without it.

    Raises:
        CheckpointError: It is the other way round.
    """
    if is_fsdp_checkpoint(folder) != fsdp:
        wrote, here = ("with", "without") if is_fsdp_checkpoint(folder) else ("without", "with")
        raise CheckpointError(
            f"{folder} was written {wrote} FSDP, this run is {here} it: the optimizer's files differ. Resume {wrote} "
            "FSDP (--fsdp), or start a new run from the weights that save_model() writes."
        )
