"""A job whose processes are killed at random and started again, as by torchrun --max-restarts, under any engine.

The processes are forked, since twenty starts of four interpreters would take most of the time. What a launcher does
after a death is done here: the others are ended, and all are started again. Every wait is of a bounded time.
"""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import forked
from elastic_worker import told
from torch.distributed import TCPStore

WORKER = Path(__file__).with_name("elastic_worker.py")
SECONDS = 120  # for any one start: to begin, train and save as far as it is let, or to end
NOTICE = 0.3  # seconds, at most, for which the others go on after a death, until the launcher has seen it


@dataclass
class Start:
    """One start of all processes, and how it ended.

    Attributes:
        killed: The process that was killed; None of the last start, which came to the end.
        went_on_from: Step from which it went on; -1 if it was killed before that.
        reached: Last update step that was complete; -1 without any.
        saved: Last step whose save was complete, at any time before; 0 for none.
        cut_short: Checkpoints that the kill has left unfinished.
    """

    killed: int | None
    went_on_from: int
    reached: int
    saved: int
    cut_short: list[str] = field(default_factory=list)


def job(folder: Path, engine: str, processes: int, kills: int, seed: int, **settings) -> list[Start]:
    """Train to the end through so many kills of one random process each; all starts.

    Raises:
        AssertionError: A start does not begin or end in :data:`SECONDS`, or the run is over before the last kill.
    """
    folder.mkdir(exist_ok=True)
    words, chance, done = (WORKER, folder, json.dumps({"engine": engine} | settings)), random.Random(seed), []
    while True:
        before = told(folder)
        with started(words, processes, folder / f"output{len(done)}") as ranks:
            if len(done) == kills:
                wait(lambda: not any(rank.is_alive() for rank in ranks), "the last start has not ended")
                assert [rank.exitcode for rank in ranks] == [0] * processes, output(folder / f"output{len(done)}")
                return [*done, seen(folder, before, None)]
            steps, part = chance.choice((0, 1, 2, 3, 3, 4, 5)), chance.random()
            victim = chance.randrange(processes)
            reach(folder, len(before), steps, ranks, folder / f"output{len(done)}")
            time.sleep(0.4 * part)  # within an update, a switch, a save; without any update, within the beginning
            assert all(rank.is_alive() for rank in ranks), output(folder / f"output{len(done)}")
            ranks[victim].kill()
            time.sleep(NOTICE * chance.random())
        done.append(seen(folder, before, victim))


def reach(folder: Path, before: int, steps: int, ranks, printed: Path) -> None:
    """Wait until a start has begun to train and made so many updates; for none, half a second at most."""
    if steps == 0:
        time.sleep(0.5)
        return

    def is_there() -> bool:
        assert all(rank.is_alive() for rank in ranks), output(printed)
        return sum("step" in event for event in told(folder)[before:]) >= steps

    wait(is_there, "no update is made")


def seen(folder: Path, before: list[dict], victim: int | None) -> Start:
    events = told(folder)
    now = events[len(before) :]
    begins = [event["begins"] for event in now if "begins" in event]
    last = max(steps_of(before, "saved"), default=0)
    return Start(
        victim,
        begins[0] if begins else -1,
        max(steps_of(now, "step"), default=begins[0] if begins else -1),
        max([last, *steps_of(now, "saved")]),
        [path.name for path in sorted(folder.glob("checkpoint-*")) if not is_whole(path)],
    )


def steps_of(events: list[dict], kind: str) -> list[int]:
    return [event[kind] for event in events if kind in event]


def is_whole(checkpoint: Path) -> bool:
    """Whether the file that is written last can be read, and the step is that of the folder's name."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return f"checkpoint-{state['global_step']}" == checkpoint.name


@contextlib.contextmanager
def started(words, processes: int, printed: Path) -> Iterator[list]:
    """All processes of one start; whatever is left of them is killed at the end of the block."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
    }  # fmt: skip
    ranks = []
    try:
        for rank in range(processes):
            (place := printed / str(rank)).mkdir(parents=True, exist_ok=True)
            environment = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(forked.start(*words, output=place, **environment))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(SECONDS)


def wait(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} in {SECONDS} s"
        time.sleep(0.02)


def output(printed: Path) -> str:
    """What the processes of a start have printed last, and how they ended."""
    return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(printed.glob("*/stderr")))
