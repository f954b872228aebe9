"""Publishing over HTTP; the tests themselves are in publishing.py, which needs a process of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server import TOKEN, Hub

SCRIPT = Path(__file__).with_name("publishing.py")
RANK = Path(__file__).with_name("pushing_rank.py")


def run(*options: str) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_what_is_published_loads():
    run("-m", "not slow")


@pytest.mark.slow
def test_what_is_published_loads_at_length():
    run("-m", "slow")


@pytest.mark.slow
def test_of_two_processes_the_first_one_pushes(tmp_path):
    hub = Hub()
    hub.fail("POST .*/commit/", 1, 403)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [sys.executable, *torchrun, str(RANK), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr[-6000:]
    assert all(f"process {rank} of 2 after step 4" in result.stdout for rank in range(2))
    repo = hub.repos["user/ranks"]
    assert sum(path == "/api/repos/create" for _, path, _ in hub.received) == 1
    assert list(repo.titles.values()) == [
        "init", *(f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")),
        "End of training",
    ]  # fmt: skip
    assert set(repo.tags) == {"phase-0-factored", "phase-1-dense"}
    assert {f"last-checkpoint/rng_state_{rank}.pth" for rank in range(2)} <= repo.names("trial")
