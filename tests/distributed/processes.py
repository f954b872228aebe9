"""Runs of worker.py in processes of their own, under torchrun or accelerate launch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("worker.py")
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: {processes}
machine_rank: 0
main_process_port: {port}
mixed_precision: 'no'
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(folder: Path, processes: int) -> list[str]:
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [sys.executable, *(command if processes > 1 else [])]


def accelerate(folder: Path, processes: int) -> list[str]:
    """As after ``accelerate config``. MULTI_GPU means torchrun, on CPUs too if the arguments say use_cpu; accelerate's
    own ``--cpu`` starts one process where there is no mpirun."""
    config = folder / "accelerate.yaml"
    config.write_text(ACCELERATE.format(processes=processes, port=free_port()))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


def launch_all(
    folder: Path, processes: int, cells: dict[str, dict], launcher=torchrun, timeout: int = 300
) -> dict[str, dict]:
    """Train once for each of the settings, in one launch; what was seen of each. Files go to ``folder / name``."""
    for name in cells:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    command = [*launcher(folder, processes), str(WORKER), str(folder), json.dumps(cells)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    # torchrun ends with a table of its own; what went wrong stands before it, in a process that aborts without any
    # traceback.
    assert result.returncode == 0, result.stderr[: result.stderr.find("ChildFailedError")][-8000:]
    return {name: json.loads(Path(folder, name, "seen.json").read_text()) for name in cells}


def launch(folder: Path, processes: int, launcher=torchrun, **settings) -> dict:
    return launch_all(folder, processes, {"": settings}, launcher)[""]


def final(folder: Path, name: str = "final.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)
