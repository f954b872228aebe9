"""Why a file could not be written, and what to do: a full disk, a folder that is gone, a permission, another writer."""

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = {errno.ENOENT, errno.ESTALE, errno.ENOTDIR}
_FEW = 4 * 2**20  # bytes: less is no room for a checkpoint's small files
_TORCH_STREAM = ("inline_container", "PytorchStreamWriter", "iostream")
_TORCH_OPEN = ("Parent directory", "cannot be opened")


def is_write_error(error: BaseException) -> bool:
    """Whether it says that a file could not be written: torch.save has no type of its own for it."""
    torch_save = any(words in str(error) for words in (*_TORCH_STREAM, *_TORCH_OPEN))
    return isinstance(error, OSError | SafetensorError) or (isinstance(error, RuntimeError) and torch_save)


def remedy(folder: Path, error: BaseException) -> str:
    """What was found where a file should be written, and what to do about it.

    Args:
        folder: ``checkpoint-N``, or the folder of a model, as it was at the time of the error.
        error: One that :func:`is_write_error` knows, or any other.
    """
    code, parent = _code(error), folder.parent
    if not parent.is_dir():
        return (
            f"The folder {parent} is gone: somebody, or a clean-up of old files, has removed it. Give an output_dir "
            "that stays."
        )
    if code in _REFUSED or not os.access(folder if folder.is_dir() else parent, os.W_OK | os.X_OK):
        return (
            f"This process may not write there. Give the job's user the right to write into {parent}, or another "
            "output_dir."
        )
    free = shutil.disk_usage(parent).free
    if code in _FULL or free < _FEW or (code is None and _in_stream(error)):
        return (
            f"{free / 2**20:,.0f} MiB are free there. Earlier checkpoints are as they were. Make room, or keep fewer "
            "checkpoints (save_total_limit), and go on with resume_from_checkpoint=True."
        )
    if code in _GONE or _not_opened(error) or isinstance(error, FileExistsError):
        return (
            "A file or folder was removed or renamed during the save: another process writes there too. Give every run "
            f"an output_dir of its own, and look whether two of them write into {parent}. Earlier checkpoints are as "
            "this run has left them."
        )
    return (
        f"{free / 2**20:,.0f} MiB are free there, so that it is not for want of room. Look after the file system of "
        f"{parent}, and go on with resume_from_checkpoint=True. Earlier checkpoints are as they were."
    )


def _code(error: BaseException) -> int | None:
    """The system's number of the error; safetensors tells it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _in_stream(error: BaseException) -> bool:
    # torch.save says of a short write neither why nor where; what it could not open is told apart.
    return any(words in str(error) for words in _TORCH_STREAM) and not _not_opened(error)


def _not_opened(error: BaseException) -> bool:
    return any(words in str(error) for words in _TORCH_OPEN)
