"""Two processes under every engine: equal bits after three switches, the same as one process, and a resume to the bit.

They are real ones, on two accelerators where there are, else on the CPU over gloo. What they have saved is read by two
new ones.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_drt.doctor.check import Bench, Finding, Result, found, not_tried
from hf_drt.doctor.devices import devices_here
from hf_drt.doctor.engines import no_group
from hf_drt.doctor.launch import DENSE, Seen, each_engine
from hf_drt.doctor.trial_loop import SAVED, STEPS, TrialLoop
from hf_drt.engines import Single

PROCESSES = 2
_UNJOINED = ("single",)  # engines whose processes know nothing of each other
_CLOSE = 1e-3  # relative difference of a weight from that of one process


def check_processes(bench: Bench) -> Iterator[Finding]:
    """Three findings for each engine that runs in several processes."""
    kind = bench.device.type
    if kind != "cpu" and len([d for d in devices_here() if d.type == kind]) < PROCESSES:
        yield not_tried(f"two processes on {kind}", "there is one such device only; those below are on the CPU")
        kind = "cpu"
    if (why := no_group(kind)) is not None:
        yield not_tried("two processes", why)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = each_engine("train", kind, PROCESSES, folder, skip=_UNJOINED, quick=bench.quick)
        rest = [*_UNJOINED, *first.errors, *(engine for engine, row in first.rows.items() if "left_out" in row)]
        second = each_engine("resume", kind, PROCESSES, folder, skip=rest) if first.rows else Seen()
        alone = _alone(torch.device(kind))
        for engine, row in first.rows.items():
            if "left_out" in row:
                yield not_tried(engine, row["left_out"])
                continue
            yield _equal(engine, row["equal"])
            yield _as_one(engine, torch.load(folder / engine / DENSE, weights_only=True), alone)
            yield _resumed(engine, row["digest"], second)
        for engine, error in first.errors.items():
            yield Finding(engine or "two processes", Result.FAILED, error)


def _alone(device: torch.device) -> dict[str, Tensor]:
    """The weights that one process ends with, on the whole of every batch."""
    loop = TrialLoop(Single, device)
    loop.run()
    return loop.dense()


def _equal(engine: str, equal: list[bool]) -> Finding:
    what = f"{engine}: equal bits"
    if all(equal):
        return found(what, True, f"after each of {STEPS} steps, three of them with a switch")
    return found(what, False, f"the processes differ from update step {equal.index(False)} on", {"equal": sum(equal)})


def _as_one(engine: str, dense: dict[str, Tensor], alone: dict[str, Tensor]) -> Finding:
    off = {name: ((dense[name] - W).norm() / W.norm()).item() for name, W in alone.items()}
    name, most = max(off.items(), key=lambda item: item[1])
    seen = f"{name} is off by {most:.0e}, and may be by {_CLOSE:.0e}"
    return found(f"{engine}: as one process", most <= _CLOSE, seen, {"off": most})


def _resumed(engine: str, digest: str, second: Seen) -> Finding:
    what = f"{engine}: resumed"
    if error := second.errors.get(engine, second.errors.get("")):
        return Finding(what, Result.FAILED, error)
    row = second.rows.get(engine, {})
    if "digests" not in row:
        return not_tried(what, "the new processes did not come to it")
    same = set(row["digests"]) == {digest}
    seen = f"saved after {SAVED} steps, new processes end with {'the same' if same else 'other'} bits"
    return found(what, same, seen)
