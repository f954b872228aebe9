"""The files that an engine writes in place of ``optimizer.pt``, and under FSDP of ``model.safetensors``."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME

from hf_drt.checkpoint import CheckpointError

PLAIN, FSDP, DEEPSPEED = "", "FSDP", "DeepSpeed"
_METADATA = ".metadata"  # written last, once every process has written its shards
_LATEST = "latest"  # names the folder of the checkpoint; written last too
_OPTIMIZERS = "*zero_pp_rank_*_optim_states.pt"
_OTHER = "Resume from another checkpoint."
_FLAGS = {FSDP: "--fsdp", DEEPSPEED: "--deepspeed"}


def files_of_run(trainer: Any) -> str:
    """Whose files the checkpoints of a trainer have: PLAIN, FSDP or DEEPSPEED."""
    return FSDP if trainer.is_fsdp_enabled else DEEPSPEED if trainer.is_deepspeed_enabled else PLAIN


def saves_shards(trainer: Any) -> bool:
    """Whether the Trainer's own save_model() writes nothing, since FSDP saves in shards."""
    return trainer.is_fsdp_enabled and "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def files_of(folder: Path) -> str:
    """Whose files a checkpoint has, or what there is of it."""
    if any(folder.glob(f"{FSDP_MODEL_NAME}*")):
        return FSDP
    return DEEPSPEED if any(folder.glob("global_step*")) else PLAIN


def check_engine_files(folder: Path) -> None:
    """What an engine has written is there and whole.

    Raises:
        CheckpointError: Names what is missing or cut short.
    """
    found = files_of(folder)
    if found == FSDP:
        _check_fsdp(folder)
    elif found == DEEPSPEED:
        _check_deepspeed(folder)


def _check_fsdp(folder: Path) -> None:
    """Weights and optimizer, in one file each (FULL_STATE_DICT) or in shards."""
    whole = (folder / f"{FSDP_MODEL_NAME}.bin").exists()
    for name in (FSDP_MODEL_NAME, OPTIMIZER_NAME):
        path = folder / f"{name}.bin" if whole else folder / f"{name}_0" / _METADATA
        _check_file(path, whole)
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


def _check_deepspeed(folder: Path) -> None:
    """Of each process that wrote it the optimizer's part, and the model's state."""
    _check_file(folder / _LATEST, False)
    inside = folder / (folder / _LATEST).read_text().strip()
    parts = sorted(inside.glob(_OPTIMIZERS))
    models = sorted(inside.glob("*model_states.pt"))
    for path in (*parts, *models):
        _check_file(path, True)
    if not parts or not models:
        raise CheckpointError(f"{inside} lacks {'a model' if parts else 'an optimizer'}'s state. {_OTHER}")
    processes = len([*folder.glob("rng_state_*.pth")])  # each process has written one
    if len(parts) < processes:
        raise CheckpointError(
            f"{inside} holds the optimizer's state of {len(parts)} of {processes} processes. {_OTHER}"
        )


def _check_file(path: Path, zipped: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {_OTHER}")
    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short or damaged. {_OTHER}")


def check_engine(folder: Path, engine: str) -> None:
    """A checkpoint resumes under the engine that it was written with.

    Args:
        engine: Of this run, as :func:`files_of_run` says.

    Raises:
        CheckpointError: It is not so.
    """
    wrote = files_of(folder)
    if wrote != engine:
        said, here = (f"with {name}" if name else "without FSDP and DeepSpeed" for name in (wrote, engine))
        remedy = f"Resume with it ({_FLAGS[wrote]})" if wrote else f"Resume without {engine}"
        raise CheckpointError(
            f"{folder} was written {said}, this run is {here}: the optimizer's files differ. {remedy}, or start a new "
            "run from the weights that save_model() writes."
        )
