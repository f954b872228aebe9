"""Writing ``checkpoint-N`` so that neither a kill nor a full disk, at any moment, costs a checkpoint that was complete.

The Trainer writes file by file over what is in the folder, and ``trainer_state.json`` last. So the folder begins
empty: what an earlier save has left there would be mixed with the new files. A finished checkpoint of the same step is
moved to ``.checkpoint-N.replaced`` meanwhile, and comes back if the new one is not finished.

Only what bears :data:`MARK` is ever deleted. A checkpoint has it from before its first file until its last one, and a
checkpoint that a new one has replaced from then on. Whatever else stands where a checkpoint is saved is moved aside.
"""

import contextlib
import fnmatch
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_drt.checkpoint import INPUTS_NAME, STATE_NAME
from hf_drt.ema import AVERAGE_NAME
from hf_drt.export import set_aside
from hf_drt.trainer.write_errors import is_write_error, remedy

logger = logging.getLogger(__name__)

MARK = ".drt_unfinished"
_SUFFIX = ".replaced"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
# What must not be mixed with that of another save, as patterns of file names.
CHECKPOINT_FILES = (
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "pytorch_model.*",
    "pytorch_model-?????-of-?????.bin", "pytorch_model_fsdp_*", "config.json", "generation_config.json", "optimizer.*",
    "optimizer_[0-9]*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", STATE_NAME,
    INPUTS_NAME, f".{STATE_NAME}.*", AVERAGE_NAME, f".{AVERAGE_NAME}.*", TRAINER_STATE_NAME, MARK, "global_step*",
    "latest", "zero_to_fp32.py",
)  # fmt: skip


@contextlib.contextmanager
def written_whole(folder: Path, writes: bool, limit: int | None, wait: Callable[[], None]) -> Iterator[None]:
    """Around the writing of one checkpoint.

    Args:
        folder: ``checkpoint-N``.
        writes: Whether this process writes the files that all processes share.
        limit: ``save_total_limit``. If set, checkpoints that a kill has cut short are deleted first: where a file
            system has no modification times the Trainer goes by the number, and would keep one in place of this one.
        wait: Returns once all processes have called it.

    Raises:
        OSError: A file could not be written; unfinished files are gone and earlier checkpoints are as they were.
    """
    begun = False
    try:
        if writes:
            _make_way(folder)
            for path in unfinished(folder.parent) if limit else ():
                logger.warning("%s was cut short and is deleted, since save_total_limit is set.", path.name)
                _delete(path)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).touch()
        wait()  # another process' random state must not be moved away
        begun = True
        yield
    except BaseException as error:
        failed = is_write_error(error) and not (begun and is_finished(folder))
        why = remedy(folder, error) if failed else ""
        if writes:
            _settle(folder)
        if failed:
            raise OSError(f"{folder} could not be written: {error}. {why}") from error
        raise
    if writes:
        finish(folder)
        if is_finished(folder):
            _discard_replaced(folder)


def finish(folder: Path) -> None:
    """Take the mark from a checkpoint whose last file is there."""
    if is_finished(folder):
        (folder / MARK).unlink(missing_ok=True)


def recover(run_dir: str | Path) -> None:
    """Bring back each checkpoint that was being replaced when the run was killed, unless the new one was finished."""
    for aside in Path(run_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*{_SUFFIX}"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(_SUFFIX))
        if _NAME.fullmatch(folder.name):
            _settle(folder)
    for folder in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}"):
        finish(folder.parent)


def unfinished(run_dir: Path) -> list[Path]:
    """The checkpoints of this package that a kill has cut short."""
    return [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _cut_short(path)]


def is_finished(folder: Path) -> bool:
    """Whether the file that is written last is there and whole."""
    try:
        return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text()), dict)
    except (OSError, ValueError):
        return False


def _cut_short(folder: Path) -> bool:
    """Ours by its name and by its mark, and not finished."""
    named = _NAME.fullmatch(folder.name) is not None and not folder.is_symlink()
    return named and (folder / MARK).is_file() and not is_finished(folder)


def _replaceable(folder: Path) -> bool:
    """A finished checkpoint of dynamic-rank training, and no link to a place of the user's."""
    return not folder.is_symlink() and is_finished(folder) and (folder / STATE_NAME).is_file()


def _aside(folder: Path) -> Path:
    # The Trainer's rotation looks at checkpoint-* and must not count this one.
    return folder.with_name(f".{folder.name}{_SUFFIX}")


def _make_way(folder: Path) -> None:
    if _cut_short(folder):
        _delete(folder)
    if _replaceable(folder):
        _discard_replaced(folder)
        folder.rename(_aside(folder))
    elif folder.is_symlink() or (folder.exists() and not _is_empty(folder)):
        set_aside(folder)


def _settle(folder: Path) -> None:
    """Keep the new checkpoint if it is finished, and otherwise the one that it was to replace."""
    if _replaceable(folder):
        finish(folder)
        _discard_replaced(folder)
        return
    if _cut_short(folder) or _is_empty(folder):
        _delete(folder)
    aside = _aside(folder)
    if _replaceable(aside) and not (aside / MARK).exists() and not folder.exists():
        aside.rename(folder)


def _discard_replaced(folder: Path) -> None:
    """Delete the checkpoint that ``folder`` has replaced. What no save has written goes over to the new one, where the
    Trainer would have left it."""
    aside = _aside(folder)
    if not (aside / MARK).is_file():
        if not _replaceable(aside):
            if aside.exists():
                set_aside(aside)
            return
        for path in list(aside.iterdir()):
            if not _is_of_a_checkpoint(path.name) and not (folder / path.name).exists():
                path.rename(folder / path.name)
        (aside / MARK).touch()
    _delete(aside)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _delete(folder: Path) -> None:
    """The mark goes last: what a kill leaves of the folder still bears it. What cannot be deleted stays."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink(missing_ok=True)
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def _is_of_a_checkpoint(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in CHECKPOINT_FILES)
