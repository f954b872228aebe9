"""Why a file could not be written, and what to do: by the system's number of the error; where a library does not tell
it, by what is found at the place. What neither tells is not guessed."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

_FEW = 4 * 2**20  # bytes: less is no room for a checkpoint's small files
_TRIAL = 2**20  # bytes of the file by which a place is tried
_NO_FOLDER = "Parent directory"  # as torch.save says it
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream", _NO_FOLDER, "cannot be opened")
_IN_USE_ON_WINDOWS = (32, 33)  # winerror: a sharing violation, a lock

_GO_ON = "and go on with resume_from_checkpoint=True."
_KEPT = "Earlier checkpoints are as they were."


def is_write_error(error: BaseException) -> bool:
    """Whether it says that a file could not be written: torch.save has no type of its own for it, and the writers of
    sharded checkpoints have one around it."""
    error = _root(error)
    if isinstance(error, OSError):  # one without a number is no answer of the system, and a connection no file
        return error.errno is not None and not isinstance(error, ConnectionError)
    torch_save = any(words in str(error) for words in _TORCH_SAVE)
    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and torch_save)


def remedy(folder: Path, error: BaseException) -> str:
    """What was found where a file should be written, and what to do about it.

    Args:
        folder: ``checkpoint-N``, or the folder of a model, as it was at the time of the error.
        error: One that :func:`is_write_error` knows, or any other.
    """
    error = _root(error)
    if (elsewhere := _elsewhere(folder, error)) is not None:
        return (
            f"{elsewhere} is no file of this checkpoint: it is read or written by what takes part in saving, the "
            f"model's own code or a callback for one. {_KEPT} See that it is there and may be used, {_GO_ON}"
        )
    if not folder.parent.is_dir():
        return (
            f"The folder {folder.parent} is gone: somebody, or a clean-up of old files, has removed it. Give an "
            "output_dir that stays."
        )
    code = _code(error)
    if code is None:
        return _found(folder, error)
    return _BY_CODE.get(code, _unknown)(folder, code)


def _elsewhere(folder: Path, error: BaseException) -> Path | None:
    """The file that the system names, if it is not at the place."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str) or not Path(name).is_absolute():
        return None
    places = (folder.parent.absolute(), folder.parent.resolve())
    return None if any(Path(name).is_relative_to(place) for place in places) else Path(name)


def _found(folder: Path, error: BaseException) -> str:
    """Where there is no number, what can be seen there now."""
    if _NO_FOLDER in str(error):
        return _gone(folder, errno.ENOENT)
    if (refused := _trial(folder if folder.is_dir() else folder.parent)) is not None:
        return _BY_CODE.get(refused, _unknown)(folder, refused)
    if _free(folder) < _FEW:
        return _full(folder, errno.ENOSPC)
    if _size_limit() is not None:
        return _too_large(folder, errno.EFBIG)
    return (
        f"What wrote does not tell why. Now {_mib(folder)} MiB are free there, and a file of {_TRIAL // 2**20} MiB "
        f"could be written. {_KEPT} Look whether others fill the file system of {folder.parent} at times, {_GO_ON}"
    )


def _trial(folder: Path) -> int | None:
    """The number of the error that writing a file there ends with."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * _TRIAL)
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return refused.errno
    return None


# ---- by number: each takes the folder and the number, and says what it means and what to do


def _full(folder: Path, code: int) -> str:
    if _no_inodes(folder.parent):
        return (
            f"The file system of {folder.parent} can hold no more files (its inodes are used up), though "
            f"{_mib(folder)} MiB are free there. {_KEPT} Delete files, {_GO_ON}"
        )
    return (
        f"{_mib(folder)} MiB are free there. {_KEPT} Make room, or keep fewer checkpoints (save_total_limit), {_GO_ON}"
    )


def _over_quota(folder: Path, code: int) -> str:
    return (
        f"The quota of this user or project is used up there; the file system itself has {_mib(folder)} MiB free. "
        f"{_KEPT} Delete files that count, keep fewer checkpoints (save_total_limit), or ask for more, {_GO_ON}"
    )


def _too_large(folder: Path, code: int) -> str:
    limit = _size_limit()
    whose = "the file system has a limit" if limit is None else f"this process may write {limit:,} bytes a file"
    return (
        f"The file would be larger than is allowed there: {whose} (ulimit -f tells that of a process). {_KEPT} Raise "
        f"it, or give an output_dir elsewhere, {_GO_ON}"
    )


def _refused(folder: Path, code: int) -> str:
    return (
        f"This process may not write there. Give the job's user the right to write into {folder.parent}, or another "
        "output_dir."
    )


def _read_only(folder: Path, code: int) -> str:
    return (
        f"The file system of {folder.parent} is mounted for reading only, be it so by intent or after a fault of the "
        "disk. Mount it for writing, or give an output_dir elsewhere."
    )


def _gone(folder: Path, code: int) -> str:
    what = "A file in it" if folder.is_dir() else f"The folder {folder.name}"
    return (
        f"{what} was removed or renamed during the save, or another stands in its place: another process writes or "
        f"clears up there too. Give every run an output_dir of its own, and look whether two of them write into "
        f"{folder.parent}. Earlier checkpoints are as this run has left them."
    )


def _long(folder: Path, code: int) -> str:
    return (
        f"A name is longer than the file system allows; {folder.absolute()} alone has "
        f"{len(os.fsencode(folder.absolute()))} bytes. Give a shorter output_dir."
    )


def _in_use(folder: Path, code: int) -> str:
    return (
        "The file is locked or in use by another program (one that synchronises, scans or backs up files, or a second "
        f"run). {_KEPT} Keep it away from {folder.parent}, {_GO_ON}"
    )


def _many_files(folder: Path, code: int) -> str:
    whose = "this process" if code == errno.EMFILE else "the whole system"
    return (
        f"No more files can be opened: {whose} has as many open as it may. {_KEPT} Raise the limit (ulimit -n), or use "
        f"fewer workers of data loaders, {_GO_ON}"
    )


def _no_memory(folder: Path, code: int) -> str:
    return f"The system had no memory left for the write. {_KEPT} Free memory, {_GO_ON}"


def _is_a_folder(folder: Path, code: int) -> str:
    return f"A folder stands where a file of {folder} is to be written. Remove or rename it."


def _broken(folder: Path, code: int) -> str:
    return (
        f"The disk has failed, or the network by which it is reached; it is not for want of room ({_mib(folder)} MiB "
        f"are free there). Look after the file system of {folder.parent}, {_GO_ON} {_KEPT}"
    )


def _unknown(folder: Path, code: int) -> str:
    return (
        f"The system's reason is {errno.errorcode.get(code, code)}; {_mib(folder)} MiB are free there. {_KEPT} Look "
        f"after the file system of {folder.parent}, {_GO_ON}"
    )


_Explain = Callable[[Path, int], str]
_MEANINGS: dict[_Explain, tuple[str, ...]] = {
    _full: ("ENOSPC",),
    _over_quota: ("EDQUOT",),
    _too_large: ("EFBIG",),
    _refused: ("EACCES", "EPERM"),
    _read_only: ("EROFS",),
    _gone: ("ENOENT", "ESTALE", "ENOTDIR", "EEXIST", "ENOTEMPTY"),
    _long: ("ENAMETOOLONG",),
    _in_use: ("EBUSY", "ETXTBSY", "EAGAIN", "EDEADLK", "ENOLCK"),
    _many_files: ("EMFILE", "ENFILE"),
    _no_memory: ("ENOMEM",),
    _is_a_folder: ("EISDIR",),
    _broken: ("EIO", "EREMOTEIO", "ENODEV", "ENXIO", "ETIMEDOUT", "EHOSTDOWN", "ENETDOWN", "ENOTCONN"),
}
# Not every system has every one.
_BY_CODE = {
    getattr(errno, name): explain for explain, names in _MEANINGS.items() for name in names if hasattr(errno, name)
}


# ---- what the error and the place tell


def _root(error: BaseException) -> BaseException:
    """The error itself, out of what was put around it: the ``failures`` of the processes by which
    ``torch.distributed.checkpoint`` tells of them, or a cause."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        first = failures[min(failures)]
        return _root(first[0] if isinstance(first, tuple) else first)
    if error.__cause__ is not None and not isinstance(error, OSError | SafetensorError):
        return _root(error.__cause__)
    return error


def _code(error: BaseException) -> int | None:
    """The system's number of the error; safetensors tells it in its text."""
    if getattr(error, "winerror", None) in _IN_USE_ON_WINDOWS:
        return errno.EBUSY
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder.parent).free


def _mib(folder: Path) -> str:
    return f"{_free(folder) / 2**20:,.0f}"


def _no_inodes(place: Path) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    seen = os.statvfs(place)
    return seen.f_files > 0 and seen.f_favail == 0


def _size_limit() -> int | None:
    """Bytes that this process may write into one file, where there is a limit."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
