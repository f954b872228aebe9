"""The functions that write the files of a checkpoint, with something else done in their place: a kill, a full disk."""

import contextlib
import inspect
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers.modeling_utils
from transformers import TrainerState

import hf_drt.trainer.driver
from hf_drt.checkpoint.state_file import STATE_NAME

# In the order in which they are written.
FILES = [
    "model.safetensors", "training_args.bin", "drt_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
]  # fmt: skip

# owner, name of its function, name of the argument that says where to
WRITERS = [
    (transformers.modeling_utils, "safe_save_file", "filename"),
    (torch, "save", "f"),
    (hf_drt.trainer.driver, "write_state", "folder"),
    (TrainerState, "save_to_json", "json_path"),
]
Act = Callable[[Path, Callable[[], None]], None]


@contextlib.contextmanager
def around_writes(folder: str, act: Act) -> Iterator[None]:
    """Within, ``act(path, write)`` is called in place of each write to a file in a folder of this name."""

    def watched(function, argument):
        signature = inspect.signature(function)

        def replacement(*args, **kwargs):
            path = Path(signature.bind(*args, **kwargs).arguments[argument])
            path = path / STATE_NAME if argument == "folder" else path
            if path.parent.name != folder:
                return function(*args, **kwargs)
            return act(path, lambda: function(*args, **kwargs))

        return replacement

    with contextlib.ExitStack() as stack:
        for owner, name, argument in WRITERS:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), argument)))
        yield


def cut_short(path: Path) -> bytes:
    """Leave half of the file; its whole content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


def killing(file: str, place: str) -> Act:
    """SIGKILL before this file is written, or in the middle of it."""

    def act(path: Path, write: Callable[[], None]) -> None:
        if path.name == file and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write()
        if path.name == file:
            cut_short(path)
            os.kill(os.getpid(), signal.SIGKILL)

    return act
