"""Model types tried in processes of their own: a crash, a hang or a lack of memory costs one type, not the sweep.

A process is forked off one that has imported the libraries, which takes longer than a tiny model.
"""

import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

from tests.sweep.attempt import FAILED, UNBUILT, Result, attempt

MEMORY = 8 * 2**30  # bytes a process may ask for


def sweep(types: Sequence[tuple[str, str]], jobs: int, timeout: float) -> Iterator[Result]:
    """Results in the order in which they come.

    Args:
        types: Model type and class name.
        jobs: Processes at a time.
        timeout: Seconds after which a process is ended.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(types)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                item = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(*item, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (process, item, time.monotonic())
            ready = wait(list(running), timeout=0.2)
            for receiver, (process, item, started) in list(running.items()):
                late = time.monotonic() - started > timeout
                if receiver in ready or late:
                    del running[receiver]
                    yield _result(receiver, process, item, timeout, receiver in ready)
    finally:
        for process, *_ in running.values():
            process.kill()


def _work(model_type: str, name: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sender.send(attempt(model_type, name))


def _result(
    receiver: Connection, process: multiprocessing.Process, item: tuple[str, str], timeout: float, ready: bool
) -> Result:
    try:
        if not ready:
            return Result(*item, UNBUILT, f"no result after {timeout:g} s", timeout)
        return receiver.recv()
    except EOFError:
        process.join()
        return Result(*item, FAILED, f"the process ended with exit code {process.exitcode}")
    finally:
        receiver.close()
        process.kill()
        process.join()
