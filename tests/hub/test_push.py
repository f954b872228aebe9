"""Publishing over HTTP; the tests themselves are in publishing.py, which needs a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("publishing.py")


def run(*options: str) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_what_is_published_loads():
    run("-m", "not slow")


@pytest.mark.slow
def test_what_is_published_loads_at_length():
    run("-m", "slow")
