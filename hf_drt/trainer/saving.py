"""Writing ``checkpoint-N`` so that neither a kill nor a full disk, at any moment, costs a checkpoint that was complete.

The Trainer writes file by file over what is in the folder, and ``trainer_state.json`` last. So the folder begins
empty: what an earlier save has left there would be mixed with the new files. A finished checkpoint of the same step is
moved to ``.checkpoint-N.replaced`` meanwhile, and comes back if the new one is not finished.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

_SUFFIX = ".replaced"


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
    try:
        if writes:
            _make_way(folder)
            for path in unfinished(folder.parent) if limit else ():
                logger.warning("%s was cut short and is deleted, since save_total_limit is set.", path.name)
                shutil.rmtree(path, ignore_errors=True)
        wait()  # another process' random state must not be moved away
        yield
    except BaseException as error:
        if writes:
            _settle(folder)
        if _is_write_error(error):
            raise OSError(_explained(folder, error)) from error
        raise
    if writes and is_finished(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)


def recover(run_dir: str | Path) -> None:
    """Bring back each checkpoint that was being replaced when the run was killed, unless the new one was finished."""
    for aside in Path(run_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*{_SUFFIX}"):
        _settle(aside.with_name(aside.name.removeprefix(".").removesuffix(_SUFFIX)))


def unfinished(run_dir: Path) -> list[Path]:
    """The checkpoints that a kill has cut short."""
    return [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and not is_finished(path)]


def is_finished(folder: Path) -> bool:
    """Whether the file that is written last is there and whole."""
    try:
        return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text()), dict)
    except (OSError, ValueError):
        return False


def _aside(folder: Path) -> Path:
    # The Trainer's rotation looks at checkpoint-* and must not count this one.
    return folder.with_name(f".{folder.name}{_SUFFIX}")


def _make_way(folder: Path) -> None:
    if is_finished(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        folder.rename(_aside(folder))
    elif folder.exists():
        shutil.rmtree(folder)


def _settle(folder: Path) -> None:
    """Keep the new checkpoint if it is finished, and otherwise the one that it was to replace."""
    if is_finished(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    if _aside(folder).is_dir():
        _aside(folder).rename(folder)


def _is_write_error(error: BaseException) -> bool:
    # torch.save reports a failed write as a RuntimeError about its archive or its stream.
    torch_save = any(name in str(error) for name in ("inline_container", "PytorchStreamWriter", "iostream"))
    return isinstance(error, OSError | SafetensorError) or (isinstance(error, RuntimeError) and torch_save)


def _explained(folder: Path, error: BaseException) -> str:
    free = shutil.disk_usage(folder.parent).free / 2**20
    return (
        f"{folder} could not be written: {error}. {free:,.0f} MiB are free there. Earlier checkpoints are as they "
        "were. Make room, or keep fewer checkpoints (save_total_limit), and go on with resume_from_checkpoint=True."
    )
