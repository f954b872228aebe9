"""Runs of worker.py in processes of their own: forked, or under torchrun or accelerate launch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import forked
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
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def accelerate(folder: Path, processes: int) -> list[str]:
    """As after ``accelerate config``. MULTI_GPU means torchrun, on CPUs too if the arguments say use_cpu; accelerate's
    own ``--cpu`` starts one process where there is no mpirun."""
    config = folder / "accelerate.yaml"
    config.write_text(ACCELERATE.format(processes=processes, port=free_port()))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


def launch_all(
    folder: Path, processes: int, cells: dict[str, dict], launcher=None, timeout: int = 300
) -> dict[str, dict]:
    """Train once for each of the settings, in one launch; what was seen of each. Files go to ``folder / name``.

    Without a launcher the processes are forked, with the environment that torchrun gives them.
    """
    for name in cells:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    words = [str(WORKER), str(folder), json.dumps(cells)]
    if launcher is None:
        result = forked.distributed(*words, processes=processes, timeout=timeout)
    else:
        command = [*launcher(folder, processes), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    # torchrun ends with a table of its own; what went wrong stands before it, in a process that aborts without any
    # traceback.
    assert result.returncode == 0, result.stderr.partition("ChildFailedError")[0][-8000:]
    return {name: json.loads(Path(folder, name, "seen.json").read_text()) for name in cells}


def launch(folder: Path, processes: int, launcher=None, **settings) -> dict:
    return launch_all(folder, processes, {"": settings}, launcher)[""]


def a_group_of_one() -> dict[str, str]:
    """The environment of a process that is started as by torchrun --nproc_per_node 1."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place}


def run_worker(worker: Path, folder: Path, processes: int, timeout: int = 400, **settings) -> dict:
    """Run a worker that takes a folder and its settings, and writes what it saw there; with the losses of its steps.
    A single process is a group of one under DeepSpeed (``stage``), and no group otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    group = a_group_of_one() if processes == 1 and "stage" in settings else {}
    words = worker, folder, json.dumps(settings)
    result = forked.distributed(*words, processes=processes, timeout=timeout, **group)
    assert result.returncode == 0, result.stderr[-6000:]
    seen = json.loads((folder / "seen.json").read_text())
    return seen | {"losses": [row["loss"] for row in seen["history"] if "loss" in row]}


def final(folder: Path, name: str = "final.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)
