"""One process of a trial, started by :mod:`hf_drt.doctor.launch`: ``python -m hf_drt.doctor.worker FOLDER``.

FOLDER holds ``spec.json`` (:class:`hf_drt.doctor.launch.Spec`). Each process writes what it has seen to
``seen-RANK.jsonl`` there, one line before each engine and one after it; an error ends it with a traceback.
"""

import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_drt.doctor.check import told
from hf_drt.doctor.launch import SECONDS, Spec
from hf_drt.doctor.model import decoder
from hf_drt.doctor.trial_loop import SAVED, STEPS, TrialLoop
from hf_drt.engines import ENGINES, Engine, engine_of, import_engines

Row = dict[str, Any]


def main(folder: Path, rank: int) -> None:
    """Do the task for each engine that is not skipped."""
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

        for library, error in import_engines().items():
            write({"engine": library, "left_out": f"not installed ({told(error)})"})
        for name, engine in ENGINES.items():
            if name not in spec.skip:
                write({"engine": name})
                write({"engine": name} | TASKS[spec.task](name, engine, device, folder, spec))
    dist.destroy_process_group()


def begin_group(spec: Spec, folder: Path, rank: int) -> None:
    """The processes find each other by a file, so that no port has to be free."""
    backend = "gloo" if spec.device == "cpu" else dist.get_default_backend_for_device(spec.device)
    dist.init_process_group(
        backend, init_method=(folder / "store").as_uri(), rank=rank, world_size=spec.processes,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip


def started(name: str, engine: type[Engine], device: torch.device, folder: Path, spec: Spec) -> Row:
    """A step, a change of form and a step."""
    if (why := not_begun(engine, device)) is not None:
        return {"left_out": why}
    losses = TrialLoop(engine, device, dist.get_rank(), dist.get_world_size()).run(0, 3)
    return {"losses": losses, "finite": all(map(math.isfinite, losses))}


def trained(name: str, engine: type[Engine], device: torch.device, folder: Path, spec: Spec) -> Row:
    """All steps, saved on the way; whether the processes had equal bits after each."""
    if (why := not_begun(engine, device)) is not None:
        return {"left_out": why}
    loop = TrialLoop(engine, device, dist.get_rank(), dist.get_world_size())
    equal = []
    for step in range(STEPS):
        if step == SAVED:
            torch.save(loop.saved(), folder / f"{name}-{dist.get_rank()}.pt")
        loop.step(step)
        equal.append(len(set(gathered(loop.digest()))) == 1)
    dense = loop.dense()
    if dist.get_rank() == 0:
        torch.save(dense, folder / f"{name}-dense.pt")
    return {"equal": equal, "digest": loop.digest()}


def resumed(name: str, engine: type[Engine], device: torch.device, folder: Path, spec: Spec) -> Row:
    """The steps after the saved state, in a process that has not made those before."""
    path = folder / f"{name}-{dist.get_rank()}.pt"
    if not path.exists():
        return {"left_out": "nothing was saved"}
    state = torch.load(path, weights_only=True)
    loop = TrialLoop(engine, device, dist.get_rank(), dist.get_world_size(), state)
    loop.run(SAVED)
    return {"digests": gathered(loop.digest())}


TASKS = {"start": started, "train": trained, "resume": resumed}


def not_begun(engine: type[Engine], device: torch.device) -> str | None:
    """Why a hand-written loop cannot begin the engine, or None."""
    try:
        wrapped = engine.begun(decoder(8, 8, 8, 1, 1).to(device))
    except NotImplementedError as error:
        return str(error)
    if type(engine_of(wrapped)) is not engine:
        return f"{engine.__name__} is not begun by what it inherits, and says nothing of its own (Engine.begun)"
    return None


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
