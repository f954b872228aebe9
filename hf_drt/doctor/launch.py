"""Processes of a trial: started, watched and ended, so that one that fails or hangs is told of and left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_drt.doctor.extensions import compiling

SECONDS = 120  # that an engine may take, beside what it compiles
DENSE = "dense.pt"  # in the folder of a trial: W of all layers, after all steps
_PATIENCE = 3  # seconds that a process has, when it is ended, to put things in order
_PACKAGES = str(Path(__file__).parents[2])
_RANK = re.compile(r"^\[rank\d+\]: ?")  # which torch.distributed puts before the lines of a traceback
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Spec:
    """What the processes are to do.

    Attributes:
        task: Of :data:`hf_drt.doctor.worker.TASKS`.
        device: Kind of the device of each process.
        processes: How many there are.
        skip: Trials to leave out, by the name of the engine.
        quick: Leave out what may compile.
    """

    task: str
    device: str
    processes: int
    skip: list[str] = field(default_factory=list)
    quick: bool = False


@dataclass
class Seen:
    """What came of a task.

    Attributes:
        rows: Of the first process, by engine; without those that failed.
        errors: By engine, what ended the processes; under '' what ended them before the first engine.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def each_engine(
    task: str,
    device: str,
    processes: int,
    folder: Path,
    words: Sequence[str] = ("-m", "hf_drt.doctor.worker"),
    seconds: float = SECONDS,
    skip: Sequence[str] = (),
    quick: bool = False,
) -> Seen:
    """Do a task for all engines, in one launch; where one of them ends it, in another for those that are left.

    Args:
        folder: For the files of the processes.
        words: Of the command, behind that of Python; the folder comes after them.
        seconds: That an engine may take.
        skip, quick: As of :class:`Spec`.
    """
    seen, done = Seen(), [*skip]
    while True:
        (folder / "spec.json").write_text(json.dumps(asdict(Spec(task, device, processes, done, quick))))
        for path in (folder / "store", *folder.glob("seen-*.jsonl")):
            path.unlink(missing_ok=True)
        error = run([*words, str(folder)], processes, folder, seconds)
        begun = ""
        for line in (folder / "seen-0.jsonl").read_text().splitlines() if (folder / "seen-0.jsonl").exists() else ():
            row = json.loads(line)
            begun = row["engine"]
            if len(row) > 1:
                seen.rows[begun], begun = row, ""
        if error is None:
            return seen
        seen.errors[begun] = error
        if not begun:
            return seen
        done = [*skip, *seen.rows, *filter(None, seen.errors)]


def run(words: Sequence[str], processes: int, folder: Path, seconds: float) -> str | None:
    """Run Python in several processes, with ``RANK`` in the environment; None if all end well, else what went wrong.

    As soon as one fails, or the first has written nothing to its file of rows for that time, all are ended. While an
    extension is compiled they are not (:mod:`hf_drt.doctor.extensions`).
    """
    paths = [_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    group = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    outputs = [folder / f"output-{rank}.txt" for rank in range(processes)]
    running: dict[int, subprocess.Popen] = {}
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                running[rank] = subprocess.Popen(
                    [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )  # fmt: skip
        return _watched(running, outputs, folder / "seen-0.jsonl", seconds)
    finally:
        _end(running.values())


def _watched(running: dict[int, subprocess.Popen], outputs: Sequence[Path], seen: Path, seconds: float) -> str | None:
    left, written, deadline = dict(running), 0, time.monotonic() + seconds
    while left:
        size = seen.stat().st_size if seen.exists() else 0
        if size != written or compiling():
            written, deadline = size, time.monotonic() + seconds
        for rank, process in list(left.items()):
            if (code := process.poll()) is not None:
                del left[rank]
                if code != 0:
                    return f"process {rank} {_ended(code)}{_last_words(outputs[rank])}"
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, left))
            return f"process {ranks} had not ended after {seconds:g} s{_last_words(outputs[min(left)])}"
        time.sleep(0.02)
    return None


def _end(running: Iterable[subprocess.Popen]) -> None:
    """End what still runs: first as Ctrl-C does, so that one that compiles takes its lock away, for which others would
    wait for ever."""
    left = [process for process in running if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and any(process.poll() is None for process in left):
        time.sleep(0.02)
    for process in left:
        process.kill()
        process.wait()


def _ended(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with {code}"


def _last_words(output: Path) -> str:
    """The line that names an error, or the last one that a process has printed."""
    text = output.read_text(errors="replace")
    lines = [line for line in (_RANK.sub("", line).strip() for line in text.splitlines()) if line]
    errors = [line for line in lines if _ERROR.match(line)]
    return f": {(errors or lines)[-1][:300]}" if lines else ""
