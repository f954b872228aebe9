"""What can compute here: the processor, and accelerators with their memory."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_drt.doctor.check import Bench, Finding, Value, found, not_tried, raised

_SIZE = 256
_CLOSE = 2e-3  # TF32, which may be on, rounds to 10 bits


def devices_here() -> list[torch.device]:
    """Every device of this machine, accelerators first."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if kind is not None else 0
    return [*(torch.device(kind.type, index) for index in range(count) if kind is not None), torch.device("cpu")]


def device_named(name: str | None = None) -> torch.device:
    """The device that a user has named: by its kind ('cuda'), or with its number ('cuda:1'); by default the first.

    Raises:
        ValueError: There is none of this name.
    """
    here = devices_here()
    if name is None:
        return here[0]
    for device in here:
        if name in (str(device), device.type):
            return device
    raise ValueError(f"there is no device '{name}' here; there are {', '.join(map(str, here))}.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_devices(bench: Bench) -> Iterator[Finding]:
    """One finding for each device, held where a product of matrices there is what it is in float64."""
    for device in devices_here():
        what = f"{device} (used)" if device == bench.device else str(device)
        try:
            seen, values = (_processor if device.type == "cpu" else _accelerator)(device)
            error = _product_error(device)
        except Exception as failure:  # a driver too old, a device in use by another process, ...
            yield raised(what, failure)
            continue
        text = f"{seen}; a product is off by {error:.1e}"
        yield found(what, error <= _CLOSE, text, values | {"product error": error})
    for name, why in _absent():
        yield not_tried(name, why)


def _product_error(device: torch.device) -> float:
    """Relative error of a product in float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return (((a.to(device) @ b.to(device)).cpu().double() - exact).norm() / exact.norm()).item()


def _processor(device: torch.device) -> tuple[str, dict[str, Value]]:
    name, capability = _processor_name(), torch.backends.cpu.get_cpu_capability()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    values: dict[str, Value] = {"name": name, "cores": cores, "threads": threads, "capability": capability}
    return f"{name}, {cores} cores, {threads} threads, {capability}", values


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(errors="replace").splitlines() if information.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _accelerator(device: torch.device) -> tuple[str, dict[str, Value]]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        library = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        capability = f"{properties.major}.{properties.minor}"
        values: dict[str, Value] = {
            "name": properties.name, "memory": properties.total_memory, "capability": capability, "library": library,
        }  # fmt: skip
        memory = f"{properties.total_memory / 2**30:,.1f} GiB"
        return f"{properties.name}, {memory}, compute capability {capability}, {library}", values
    module = getattr(torch, device.type, None)
    named = getattr(module, "get_device_name", None)
    name = named(device) if named is not None else device.type
    return name, {"name": name}


def _absent() -> Iterator[tuple[str, str]]:
    """Kinds of accelerators that are not here, and why."""
    here = {device.type for device in devices_here()}
    if "cuda" not in here:
        built = torch.backends.cuda.is_built()
        yield "cuda", "no device found" if built else f"torch {torch.__version__} is built without it"
    if "mps" not in here:
        built = torch.backends.mps.is_built()
        yield "mps", "no device found" if built else f"torch {torch.__version__} is built without it"
