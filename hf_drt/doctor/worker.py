"""One process of a trial, started by :mod:`hf_drt.doctor.launch`: ``python -m hf_drt.doctor.worker FOLDER``.

FOLDER holds ``spec.json`` (:class:`hf_drt.doctor.launch.Spec`). Each process writes what it has seen to
``seen-RANK.jsonl`` there, one line before each engine and one after it; an error ends it with a traceback.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_drt.doctor.launch import DENSE, SECONDS, Spec
from hf_drt.doctor.trials import Place, Trial, trials

Row = dict[str, Any]


def main(folder: Path, rank: int) -> None:
    """Do the task for each engine that is not skipped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background commands ignore
    spec = Spec(**json.loads((folder / "spec.json").read_text()))
    torch.set_num_threads(1)
    device = torch.device(spec.device, rank) if spec.device != "cpu" else torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank)
    begin_group(spec, folder, rank)
    with (folder / f"seen-{rank}.jsonl").open("w") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        for name, trial in trials():
            if name not in spec.skip:
                write({"engine": name})
                place = Place(device, rank, spec.processes, folder / name, resumes=spec.task == "resume")
                why = trial.left_out(device, spec.quick)
                write({"engine": name} | (TASKS[spec.task](trial, place) if why is None else {"left_out": why}))
    dist.destroy_process_group()


def begin_group(spec: Spec, folder: Path, rank: int) -> None:
    """The processes find each other by a file, so that no port has to be free."""
    backend = "gloo" if spec.device == "cpu" else dist.get_default_backend_for_device(spec.device)
    dist.init_process_group(
        backend, init_method=(folder / "store").as_uri(), rank=rank, world_size=spec.processes,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip


def started(trial: Trial, place: Place) -> Row:
    """A step, a change of form and a step."""
    losses = trial.loop(place).run(3)
    return {"losses": losses, "finite": all(map(math.isfinite, losses))}


def trained(trial: Trial, place: Place) -> Row:
    """All steps, saved on the way; whether the processes had equal bits after each."""
    place.folder.mkdir(exist_ok=True)
    loop, equal = trial.loop(place), []
    loop.run(after=lambda: equal.append(len(set(gathered(loop.digest()))) == 1))
    dense = loop.dense()
    if place.rank == 0:
        torch.save(dense, place.folder / DENSE)
    return {"equal": equal, "digest": loop.digest()}


def resumed(trial: Trial, place: Place) -> Row:
    """The steps after the saved state, in a process that has not made those before."""
    loop = trial.loop(place)
    loop.run()
    return {"digests": gathered(loop.digest())}


TASKS: dict[str, Callable[[Trial, Place], Row]] = {"start": started, "train": trained, "resume": resumed}


def gathered(value: str) -> list[str]:
    """That of every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo may outlive the interpreter, which aborts then
