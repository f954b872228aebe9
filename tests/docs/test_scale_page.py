"""The figures of docs/scale.md are those that its commands print."""

import contextlib
import io
import tomllib

import commands
import pytest
from pages import ROOT, blocks_of
from stand_ins import llama_70b
from test_code_blocks import sessions

PAGE = ROOT / "docs" / "scale.md"
LARGE = [b for b in blocks_of(PAGE) if b.language == "console" and "llama-70b" in b.text]


def test_the_large_examples_are_there():
    assert [b.text.split("--engine ")[1].split("\n")[0] for b in LARGE] == [
        "fsdp2", "hsdp --shards 8", "zero3", "fsdp2 --links ethernet.toml",
    ]  # fmt: skip


def test_the_table_of_a_machine_is_one(tmp_path):
    from hf_drt.simulate import machine_for

    (text,) = (b.text for b in blocks_of(PAGE) if b.language == "toml")
    (tmp_path / "ethernet.toml").write_text(text)
    assert machine_for(str(tmp_path / "ethernet.toml")).name == tomllib.loads(text)["name"]


@pytest.mark.slow
@pytest.mark.parametrize("block", LARGE, ids=lambda b: b.name)
def test_the_large_examples_print_what_is_shown(block, tmp_path, monkeypatch):
    """Four runs of one to two minutes; ``...`` stands for lines left out."""
    monkeypatch.chdir(tmp_path)
    llama_70b(tmp_path / "llama-70b")
    (table,) = (b.text for b in blocks_of(PAGE) if b.language == "toml")
    (tmp_path / "ethernet.toml").write_text(table)
    ((command, shown),) = sessions(block.text)
    (words,) = commands.commands_of(command)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        commands.run(words)
    for piece in filter(None, (piece.strip() for piece in ("\n" + shown).split("\n...\n"))):
        assert piece.removesuffix("\n...").strip() in output.getvalue()
