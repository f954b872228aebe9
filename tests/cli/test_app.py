"""The program as a whole: help, a pipe, and an installation without the extra."""

import logging
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import forked
import pytest
import tiny
import transformers

from hf_drt.cli.app import COMMANDS

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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_listed_command_is_the_one_that_runs(hf_drt, command):
    own = import_module(f"hf_drt.cli.{command}")
    text = " ".join(hf_drt(command, "--help").out.split())
    assert " ".join(getattr(own, command).__doc__.split()) in text  # the real one's help, in full
    assert f"{command} {COMMANDS[command]}" in " ".join(hf_drt("--help").out.split())  # not cut short


def test_a_mistyped_command_is_told_which_one_is_near(hf_drt):
    assert "Did you mean 'inspect'?" in hf_drt("inspekt").err


def test_options_of_a_command_complete_without_the_others():
    words = {"_HF_DRT_COMPLETE": "complete_bash", "COMP_WORDS": "hf-drt report --fig", "COMP_CWORD": "2"}
    code = (
        "import sys, atexit; atexit.register(lambda: print('transformers.trainer' in sys.modules, file=sys.stderr)); "
    )
    command = [sys.executable, "-c", code + "from hf_drt.cli import main; main()"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | words)
    assert (result.stdout.split(), result.stderr.strip()) == (["--figures"], "False"), result
