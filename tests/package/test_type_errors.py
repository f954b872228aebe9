"""The number of pyright's errors may fall, never rise."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "type_errors.py"


@pytest.fixture
def project(tmp_path) -> Path:
    """One with two errors."""
    (tmp_path / "pyproject.toml").write_text('[tool.pyright]\ninclude = ["package"]\n')
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "wrong.py").write_text('x: int = "a"\ny: str = 1\n')
    (tmp_path / "other.py").write_text('z: int = "not included"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("allowed", "status", "says"),
    [
        (1, 1, "pyright finds 2 errors, 1 more than the 1 in limit.txt: mend those of the change"),
        (2, 0, "pyright finds 2 errors, as many as limit.txt allows"),
        (3, 0, "pyright finds 2 errors, fewer than the 3 in limit.txt: write 2 there"),
    ],
)
def test_a_count_is_held_against_the_one_in_the_file(project, allowed, status, says):
    (project / "limit.txt").write_text(f"{allowed}\n")
    command = [sys.executable, SCRIPT, "--project", project, "--limit", project / "limit.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stdout
    assert (f"    2  {Path('package', 'wrong.py')}" in done.stdout) == (status == 1)


def test_a_pyright_that_does_not_run_is_no_count_of_zero(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.pyright\n")
    (tmp_path / "limit.txt").write_text("0\n")
    command = [sys.executable, SCRIPT, "--project", tmp_path, "--limit", tmp_path / "limit.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pyright gave no result" in done.stderr
