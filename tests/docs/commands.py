"""The commands of a shell block, and each of them held against the parser of the program that it calls.

Nothing is run here: the parser of a recipe, of ``hf-drt`` and of ``hf_drt.run`` reads the words, and what names files,
extras, markers and addresses is looked up.
"""

import contextlib
import importlib
import re
import runpy
import shlex
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from pages import ROOT
from transformers import HfArgumentParser

import hf_drt

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = "https://github.com/hf-drt/hf_drt"
_SETTING = re.compile(r"(\w+)=(.*)", re.DOTALL)


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell text as words: comments and settings taken off, variables put in."""
    variables: dict[str, str] = {}
    found = []
    for line in _lines(text):
        words = shlex.split(_expanded(line, variables), comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", ";", "|"):
                if command:
                    found.append(command)
                command = []
            elif not command and (setting := _SETTING.fullmatch(word)):
                variables[setting[1]] = setting[2]
            else:
                command.append(word)
    return found


def _lines(text: str) -> list[str]:
    """Logical lines: joined at backslashes, and as long as a quotation is open."""
    found, open_line = [], ""
    for line in text.splitlines():
        open_line += line.removesuffix("\\") if line.endswith("\\") else line + "\n"
        try:
            shlex.split(open_line, comments=True)
        except ValueError:  # an open quotation
            continue
        if not line.endswith("\\"):
            found.append(open_line)
            open_line = ""
    assert not open_line, f"the text ends within a command: {open_line!r}"
    return found


def _expanded(line: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)


def checked(words: list[str]) -> str:
    """How the command was checked.

    Raises:
        AssertionError: It would not do what the page says, or no check is known for it.
    """
    program, rest = Path(words[0]).name, words[1:]
    if program in ("python", "python3"):
        return _python(rest)
    if program in ("torchrun", "accelerate"):
        return _launched(rest)
    assert program in PROGRAMS, f"no check is known for `{shlex.join(words)}`; mark the block `not run because ...`"
    return PROGRAMS[program](rest)


class Parsed(Exception):
    """A parser has taken the words; the program goes no further."""


def _python(words: list[str]) -> str:
    match words:
        case ["-m", "venv", _]:
            return "known"
        case ["-m", "hf_drt.run", *rest]:
            return _run(rest)
        case ["-m", "hf_drt.cli", *rest]:
            return _hf_drt(rest)
        case ["-m", "pip", *rest]:
            return _pip(rest)
        case ["-m", module, *rest]:
            return _stopped_at_its_parser(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), rest)
        case [script, *rest] if (ROOT / script).exists():
            return _script(ROOT / script, rest)
    raise AssertionError(f"there is no script or module {words[:2]}")


def _script(script: Path, words: list[str]) -> str:
    """A recipe's ``main`` is called; another script is run."""
    if "recipes" in script.parts:
        assert "parse_args" in script.read_text(), f"{script.name} takes no words, and would run"
        return _stopped_at_its_parser(lambda: importlib.import_module(script.stem).main(), words)
    return _stopped_at_its_parser(lambda: runpy.run_path(str(script), run_name="__main__"), words)


def _stopped_at_its_parser(program: Callable[[], object], words: list[str]) -> str:
    def stopping(read: Callable) -> Callable:
        def parse(*arguments: object, **options: object) -> None:
            read(*arguments, **options)
            raise Parsed

        return parse

    try:
        with (
            patch("sys.argv", ["program", *words]),
            patch.object(HfArgumentParser, "parse_args_into_dataclasses", stopping(_hf_parse)),
            patch.object(ArgumentParser, "parse_args", stopping(ArgumentParser.parse_args)),
        ):
            program()
    except Parsed:
        return "parsed"
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"the parser refuses {shlex.join(words)}") from end
        return "its help"
    raise AssertionError(f"nothing has read the words {shlex.join(words)}")


_hf_parse = HfArgumentParser.parse_args_into_dataclasses


def _launched(words: list[str]) -> str:
    """``torchrun --nproc_per_node 2 -m hf_drt.run ...``; or a script of the repository."""
    rest = list(words)
    while rest and (rest[0] == "launch" or rest[0].startswith("--")):
        takes_value = rest[0].startswith("--") and "=" not in rest[0]
        rest = rest[2 if takes_value else 1 :]
    return _python(rest)


def _run(words: list[str]) -> str:
    from hf_drt.run import read_command

    if not words or words[0] != "-m":
        words = [str(ROOT / "README.md"), *words[1:]]  # any file: read_command asks whether the script exists
    try:
        read_command(words)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"hf_drt.run refuses {shlex.join(words)}") from end
    return "parsed"


def _hf_drt(words: list[str]) -> str:
    from hf_drt.cli.app import COMMANDS, loaded

    if words[:1] == ["--help"] or words[:1] == ["--install-completion"]:
        return "known"
    name, *rest = words
    assert name in COMMANDS, f"hf-drt has no command {name}; its commands are {', '.join(COMMANDS)}"
    if "--help" not in rest:
        loaded(name).make_context(name, [word for word in rest if word != "..."])
    return "parsed"


def _pip(words: list[str]) -> str:
    assert words[0] == "install", words
    extras = PROJECT["project"]["optional-dependencies"]
    for word in words[1:]:
        if word.startswith("-"):
            continue
        if word.endswith(".whl"):
            name, version, *_ = parse_wheel_filename(word)
            assert (name, str(version)) == ("hf-drt", hf_drt.__version__), word
            continue
        local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if local:
            wanted = set(filter(None, (local[1] or "").split(",")))
        else:
            requirement = Requirement(word)
            wanted = requirement.extras if requirement.name.replace("_", "-") == "hf-drt" else set()
            assert requirement.url is None or requirement.url.split("@")[0] == f"git+{REPOSITORY}", requirement.url
        assert wanted <= set(extras), f"pyproject.toml has no extra {wanted - set(extras)}"
    return "looked up"


def _pytest(words: list[str]) -> str:
    known = {"not", "and", "or"} | {
        marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    }
    options = iter(words)
    for word in options:
        if word == "-m":
            expression = next(options)
            assert set(re.findall(r"\w+", expression)) <= known, f"there is no marker {expression}"
        elif word in ("-n", "--dist", "--durations", "-k"):
            next(options)
        elif not word.startswith("-"):
            assert (ROOT / word.split("::")[0]).exists(), f"there is no {word}"
    return "looked up"


def _git(words: list[str]) -> str:
    assert words[:2] == ["clone", REPOSITORY], words
    return "looked up"


def _cd(words: list[str]) -> str:
    assert words == [REPOSITORY.rpartition("/")[2]], words
    return "looked up"


def _mkdocs(words: list[str]) -> str:
    from mkdocs.__main__ import cli

    cli.commands[words[0]].make_context(words[0], words[1:])
    return "parsed"


PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "hf-drt": _hf_drt,
    "pip": _pip,
    "pytest": _pytest,
    "git": _git,
    "cd": _cd,
    "mkdocs": _mkdocs,
}


# ---- to run


def run(words: list[str]) -> None:
    """Run a command in this process."""
    match words:
        case ["hf-drt", *rest]:
            from hf_drt.cli.app import app

            with contextlib.suppress(SystemExit):  # its exit code; a page may show an error
                app(rest, prog_name="hf-drt")
        case ["python", "-m", "hf_drt.run", *rest]:
            from hf_drt.run import main

            main(rest)
        case ["python", script, *rest] if script.startswith("recipes/"):
            importlib.import_module(Path(script).stem).main(rest)
        case _:
            raise AssertionError(f"`{shlex.join(words)}` is not run by this test")
