"""Peak memory since a mark: the allocator's on an accelerator, the process's resident set on a CPU under Linux."""

import re
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement. A no-op where the platform has none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and _CLEAR.exists():
        try:
            _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            return


def read_peak(device: torch.device) -> float | None:
    """Peak in MiB since :func:`reset_peak`; None where the platform does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "cpu" and _CLEAR.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(match[1]) / 1024 if match else None
    return None
