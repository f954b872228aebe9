"""What an error of writing means: by its number, or by what is found at the place, on real file systems too."""

import errno
import re
import shutil

import forked
import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from hf_drt.trainer.write_errors import is_write_error, remedy


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"MiB are free there\..* Make room, or keep fewer"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"Make room, or keep fewer"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"The quota of this user or project is used up there"),
        (
            SafetensorError("I/O error: File too large (os error 27)"),
            r"larger than is allowed there: the file",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), r"may not write there\. Give the job's user the right to"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), r"may not write there\. Give the job's user"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            r"is mounted for reading only, .* Mount it for",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file"),
            r"A file in it was removed or renamed during the save, .*: another process writes or clears up there too",
        ),
        (OSError(errno.ESTALE, "Stale file handle"), r"Give every run an output_dir of its own"),
        (FileExistsError(errno.EEXIST, "File exists"), r"or another stands in its place: another process writes"),
        (RuntimeError("Parent directory run does not exist."), r"another process writes or clears up there too"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long"),
            r"A name is longer than the file system allows",
        ),
        (OSError(errno.EBUSY, "Device or resource busy"), r"locked or in use by another program .* Keep it away from"),
        (OSError(errno.ENOLCK, "No locks available"), r"locked or in use by another program"),
        (OSError(errno.EMFILE, "Too many open files"), r"this process has as many open as it may\..* \(ulimit -n\)"),
        (OSError(errno.ENFILE, "Too many open files in system"), r"the whole system has as many open as it may"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            r"had no memory left for the write\..* Free memory",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), r"A folder stands where a file of .* is to be written"),
        (
            OSError(errno.EIO, "Input/output error"),
            r"The disk has failed, .* Look after the file system",
        ),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), r"or the network by which it is reached"),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links"),
            r"The system's reason is ELOOP; [\d,]+ MiB are",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos"),
            r"What wrote does not tell why",
        ),
        (
            RuntimeError("File optimizer.pt cannot be opened."),
            r"Now [\d,]+ MiB are free there, and a file of 1",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/usr/share/modeling_of_mine.py"),
            r"/usr/share/modeling_of_mine\.py is no file of this checkpoint: it is read or written by what takes part",
        ),
    ],
    ids=str,
)
def test_a_save_that_fails_says_why_and_what_to_do(tmp_path, error, message):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    assert is_write_error(error)
    assert re.search(message, remedy(folder, error))
    others = [meaning for meaning in MEANINGS if meaning in remedy(folder, error)]
    assert len(others) == 1, others


# One of each answer: no error may have two.
MEANINGS = [
    "Make room", "The quota", "larger than is allowed", "may not write", "for reading only", "removed or renamed",
    "A name is longer", "in use by another", "as many open as", "had no memory", "A folder stands", "has failed",
    "The system's reason", "does not tell why", "is no file of this",
]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [OSError("Can't load the tokenizer"), ConnectionError(errno.ECONNREFUSED, "refused"), ValueError("os error 28")],
    ids=str,
)
def test_what_is_no_answer_of_a_file_system_is_left_as_it_is(error):
    assert not is_write_error(error)


def test_an_error_of_several_processes_is_that_of_the_first_that_failed(tmp_path):
    """As torch.distributed.checkpoint raises it on all of them, for sharded checkpoints."""
    failures = {3: _wrap_exception(OSError(errno.EDQUOT, "over")), 1: _wrap_exception(OSError(errno.EROFS, "ro"))}
    error = CheckpointException("write", failures)
    assert is_write_error(error)
    assert "mounted for reading only" in remedy(tmp_path / "checkpoint-4", error)
    assert not is_write_error(CheckpointException("write", {0: _wrap_exception(ValueError("shapes"))}))


def test_the_cause_of_an_error_counts(tmp_path):
    error = RuntimeError("the model could not be saved")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_write_error(error)
    assert "Make room" in remedy(tmp_path / "checkpoint-4", error)


def test_where_no_number_is_told_few_free_bytes_are_a_full_disk(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    silent = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert "Make room" in remedy(tmp_path / "checkpoint-4", silent)
    assert "has failed" in remedy(tmp_path / "checkpoint-4", OSError(errno.EIO, "Input/output error"))


# ---- real file systems of a few MiB, in a process that may mount them for itself alone

MOUNTED = """
import ctypes, os, sys
import torch
from pathlib import Path
from hf_drt.trainer.write_errors import is_write_error, remedy

NEW_USER, NEW_MOUNTS, READ_ONLY, REMOUNT = 0x10000000, 0x00020000, 1, 32
libc = ctypes.CDLL(None, use_errno=True)
place, kind = Path(sys.argv[1]), sys.argv[2]
options = b"size=4m,nr_inodes=8" if kind == "inodes" else b"size=4m"
if libc.unshare(NEW_MOUNTS) and libc.unshare(NEW_USER | NEW_MOUNTS):
    sys.exit(77)
libc.mount(None, b"/", None, 0x44000, None)  # private and recursive: nobody else sees what follows
if libc.mount(b"none", bytes(place), b"tmpfs", 0, options):
    sys.exit(77)
folder = place / "checkpoint-1"
folder.mkdir()
if kind == "inodes":
    for number in range(5):
        (folder / str(number)).touch()
if kind == "read-only" and libc.mount(b"none", bytes(place), b"tmpfs", READ_ONLY | REMOUNT, options):
    sys.exit(77)
try:
    torch.save(torch.zeros(2**21), folder / "optimizer.pt")
except BaseException as error:
    assert is_write_error(error), repr(error)
    print(type(error).__name__, "|", str(error).splitlines()[0], "|", remedy(folder, error))
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("full", r"RuntimeError \| .* \| [\d,]+ MiB are free there\. .* Make room"),
        ("inodes", r"\| The file system of .* can hold no more files \(its inodes are used up\)"),
        ("read-only", r"\| The file system of .* is mounted for reading only"),
    ],
)
def test_on_a_real_file_system_torch_save_fails_without_a_number_and_the_reason_is_found(tmp_path, kind, message):
    result = forked.python("-c", MOUNTED, tmp_path, kind)
    if result.returncode == 77:
        pytest.skip("this user may not mount a file system")
    assert result.returncode == 0, result.stderr
    assert re.search(message, result.stdout), result.stdout
