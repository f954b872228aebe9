"""What an update step of each method takes, measured side by side: the methods take turns, some steps each.

Each method is a process of its own, as in its runs, and waits for its turn. What else the machine does at a time falls
on all methods alike. The first step of a turn finds the caches of the processor filled by another method; it is not
counted.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

TURN, DONE = "turn\n", "done\n"


class Turns(TrainerCallback):
    """In the process of a method: says that ``steps`` steps are over, and waits until the next ones may begin."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._running = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._over()
            self._running = sys.stdin.readline() == TURN

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._over()

    def _over(self) -> None:
        if self._running:
            print(DONE, end="", flush=True)
        self._running = False


def measured(commands: dict[str, list[str]], answers: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of processes that take turns, each with its method's name; all that there are, before an error.

    Args:
        commands: Of each method's process, whose trainer has :class:`Turns`.
        answers: Where each writes its record at its end.

    Raises:
        RuntimeError: A process fails.
    """
    processes = {
        method: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=answers[method].with_suffix(".err").open("w"), text=True)
        for method, command in commands.items()
    }  # fmt: skip
    waiting = dict(processes)
    while waiting:
        for method, process in list(waiting.items()):
            if not _turn(process):
                del waiting[method]
    failed = [method for method, process in processes.items() if process.wait()]
    for method in processes.keys() - set(failed):
        yield method, json.loads(answers[method].read_text())
    for method in failed:
        said = answers[method].with_suffix(".err").read_text()
        raise RuntimeError(f"the pilot of {method} failed:\n{said[-3000:]}")


def _turn(process: subprocess.Popen[str]) -> bool:
    """Give the turn to a process, and wait until its steps are over; False if it has ended."""
    try:
        process.stdin.write(TURN)
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return any(line == DONE for line in process.stdout)  # of which a Trainer may print others
