"""Python programs of tests in processes of their own, forked from one that has imported torch and transformers.

The import takes five seconds of every program that begins in the ordinary way, and most of them train for one. What a
launcher or a fresh interpreter does is tested with real ones; everything else needs only processes.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

# Nothing of hf_drt: a program may show that it does without.
IMPORTED = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel",
    "transformers.trainer", "transformers.trainer_seq2seq", "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert", "transformers.models.vit.modeling_vit", "accelerate", "datasets",
    "pytest", "deepspeed",  # which Accelerate loads in every training that unwraps its model, where it is installed
)  # fmt: skip


def python(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """What ``python WORDS`` does (a script, ``-m module`` or ``-c code``), and its output; more environment variables.

    Raises:
        subprocess.TimeoutExpired: After that many seconds.
    """
    return _finished(words, [environment], timeout)


def distributed(*words: object, processes: int, timeout: float = 300, **environment: str):
    """As ``torchrun --nproc_per_node PROCESSES WORDS``: if one process fails, the others are ended. One is no group."""
    if processes == 1:
        return python(*words, timeout=timeout, **environment)
    # Of this process, as the agent's of torchrun: the system chooses the port, and nobody can take it meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
    }  # fmt: skip
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment for rank in range(processes)]
    return _finished(words, ranks, timeout)


def start(*words: object, output: str | Path | None = None, **environment: str) -> ForkServerProcess:
    """The running program of :func:`python`; what it prints goes to files in the folder ``output``, or nowhere."""
    process = _server().Process(
        target=_become, args=([str(word) for word in words], {**os.environ, **environment}, output), daemon=True
    )
    # multiprocessing would import the main module again in the child, pytest with all its plugins.
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    return process


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _finished(words, environments: list[Mapping[str, str]], timeout: float) -> subprocess.CompletedProcess:
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in environments]
        ranks = [start(*words, output=folder, **env) for folder, env in zip(folders, environments, strict=True)]
        stack.callback(_end, ranks)
        code = _first_failure(ranks, time.monotonic() + timeout)
        _end(ranks)
        stdout, stderr = ("".join(_texts(folders, name)) for name in ("stdout", "stderr"))
    if code is None:
        raise subprocess.TimeoutExpired(list(words), timeout, stdout, stderr)
    return subprocess.CompletedProcess(list(words), code, stdout, stderr)


def _first_failure(ranks: list[ForkServerProcess], deadline: float) -> int | None:
    """The exit status of the first process that fails, 0 if none does; None at the deadline."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            return None
        codes = [running.pop(sentinel).exitcode for sentinel in ended]
        if any(codes):
            return next(filter(None, codes))
    return 0


def _end(ranks: list[ForkServerProcess]) -> None:
    for rank in ranks:
        rank.kill()
        rank.join()


def _texts(folders: list[Path], name: str) -> Iterator[str]:
    return ((folder / name).read_text(errors="replace") for folder in folders if (folder / name).exists())


# ---- in the new process


def _become(words: list[str], environment: dict[str, str], output: str | Path | None) -> None:
    """Be the program, as far as it can tell."""
    for name, stream in (("stdout", 1), ("stderr", 2)):
        path = os.devnull if output is None else Path(output, name)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    gc.freeze()  # what was imported: neither looked through nor, for its marks, copied
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    match words:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, os.path.dirname(script))
            runpy.run_path(script, run_name="__main__")
