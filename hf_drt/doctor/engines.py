"""Which engines are installed, and whether each can begin, train, change form and go on, in one process."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from hf_drt.doctor.check import Bench, Finding, Result, found, not_tried
from hf_drt.doctor.launch import each_engine


def check_engines(bench: Bench) -> Iterator[Finding]:
    """One finding for each engine of the registry, and for each library of one that is not installed."""
    device = bench.device.type
    if (why := no_group(device)) is not None:
        yield not_tried("engines", why)
        return
    with tempfile.TemporaryDirectory() as folder:
        seen = each_engine("start", device, 1, Path(folder), quick=bench.quick)
    for name, row in seen.rows.items():
        if "left_out" in row:
            yield not_tried(name, row["left_out"])
        else:
            losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
            yield found(name, row["finite"], f"three steps and a switch, losses {losses}")
    for name, error in seen.errors.items():
        yield Finding(name or "engines", Result.FAILED, error)


def no_group(device: str) -> str | None:
    """Why processes on this kind of device cannot talk to each other, or None."""
    if not dist.is_available():
        return "torch is built without torch.distributed"
    if device == "cpu":
        return None if dist.is_gloo_available() else "torch is built without gloo"
    if device == "cuda":
        return None if dist.is_nccl_available() else "torch is built without NCCL"
    return f"nothing is known of processes on {device}"
