"""The program as a whole: help, a pipe, and an installation without the extra."""

import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import forked
import pytest
import tiny
import transformers

ROOT = Path(__file__).parents[2]


def test_help_names_the_commands(hf_drt):
    out = hf_drt("--help").out
    for command in ("plan", "inspect", "export", "compare", "--install-completion"):
        assert command in out
    assert out.isascii()


def test_no_command_and_an_unknown_one(hf_drt):
    assert hf_drt("guess").code == 2
    assert "No such command 'guess'" in hf_drt("guess").err
    assert "Commands" in hf_drt().out + hf_drt().err


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["hf-drt"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_in_a_pipe(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "hf_drt.cli", "inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert result.stderr == ""  # no progress bar, no warning
    failed = forked.python("-m", "hf_drt.cli", "inspect", "/no/such")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("hf-drt: error: there is no such path: /no/such.")


def test_without_typer_the_extra_is_named(monkeypatch):
    from hf_drt.cli import main

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"hf-drt needs the package 'typer': pip install 'hf-drt\[cli\]'"):
        main()


def test_a_command_leaves_the_logging_of_its_process_alone(hf_drt, configured):
    logger, before = logging.getLogger("hf_drt"), transformers.logging.get_verbosity()
    level = logger.level
    assert hf_drt("plan", configured(), "--rank-multiple", 4, "--seq-length", 8).code == 0
    assert hf_drt("plan", "/no/such").code == 1
    assert (logger.level, transformers.logging.get_verbosity()) == (level, before)
