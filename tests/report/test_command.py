"""``hf-drt report`` as it is typed: what it writes, and what it says of a wrong command line."""

import sys

import folders
import pytest
from typer.testing import CliRunner

from hf_drt.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def test_it_writes_a_page_and_pictures(tmp_path):
    first, second = folders.plain_run(tmp_path / "first"), folders.plain_run(tmp_path / "second")
    page, pictures = tmp_path / "new" / "page.html", tmp_path / "pictures"
    result = run(first, second, "--output", page, "--figures", pictures)
    assert result.exit_code == 0, result.output
    assert f"wrote {page} (" in result.stdout
    assert f"wrote 6 pictures to {pictures}" in result.stdout
    assert "first, second" in page.read_text()
    assert len(list(pictures.iterdir())) == 6


def test_the_page_is_report_html_and_may_be_written_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.plain_run(tmp_path / "run")
    for _ in range(2):
        assert run("run").exit_code == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob("*.png"))


def test_a_wrong_folder_is_refused_before_anything_is_written(tmp_path):
    whole = folders.plain_run(tmp_path / "run")
    page, pictures = tmp_path / "page.html", tmp_path / "pictures"
    message = refused(whole, tmp_path / "nowhere", "-o", page, "--figures", pictures)
    assert message.startswith("hf-drt: error: there is no folder")
    assert not page.exists()
    assert not pictures.exists()


def test_targets_that_would_cost_something_else(tmp_path):
    folder = folders.plain_run(tmp_path / "run")
    log = folder / "trainer_state.json"
    before = log.read_bytes()
    assert f"--output {tmp_path} is a folder; name the HTML file" in refused(folder, "-o", tmp_path)
    assert "is not an HTML page; it is not written over" in refused(folder, "-o", log)
    assert f"--figures {log} is a file; name a folder" in refused(folder, "-o", tmp_path / "p.html", "--figures", log)
    assert log.read_bytes() == before
    assert not (tmp_path / "p.html").exists()


def test_pictures_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_drt.report.figures", raising=False)
    folder = folders.plain_run(tmp_path / "run")
    message = refused(folder, "-o", tmp_path / "p.html", "--figures", tmp_path / "pictures")
    assert "--figures needs the package 'matplotlib': pip install 'hf-drt[report]'." in message
    assert run(folder, "-o", tmp_path / "p.html").exit_code == 0  # the page does not


@pytest.mark.parametrize("arguments", [(), ("--figures", "x")])
def test_without_a_run(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "RUN_DIR" in result.stderr
