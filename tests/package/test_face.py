"""Licence, citation, changelog and the checks before a commit: they are there, and say the same as pyproject.toml."""

import hashlib
import re
import tomllib
from pathlib import Path

import yaml
from packaging.version import Version
from test_wheel import version

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
# Of the licence's own text, its words joined by single blanks.
APACHE_2 = "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_licence_is_apache_2_word_for_word():
    assert hashlib.sha256(" ".join(read("LICENSE").split()).encode()).hexdigest() == APACHE_2
    assert PROJECT["license"] == yaml.safe_load(read("CITATION.cff"))["license"] == "Apache-2.0"


def test_the_citation_has_what_its_format_asks_for_and_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2508.08625"
    card = read("hf_drt/export/card.py")
    assert paper["title"] in card
    assert all(f"{a['family-names']}, {a['given-names']}" in card for a in paper["authors"])


def test_the_version_stands_in_one_place_and_the_changelog_knows_it():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hf_drt.__version__"}
    sections = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    # A version in the making comes after the newest that was released.
    assert version() == sections[1] or (Version(version()).is_devrelease and Version(version()) > Version(sections[1]))


def test_a_commit_is_checked_by_the_ruff_of_the_tests():
    (pinned,) = [text for text in PROJECT["optional-dependencies"]["test"] if text.startswith("ruff")]
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["entry"].split()[:2] for hook in repository["hooks"]] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [pinned] for hook in repository["hooks"])
    assert "==" in pinned


def test_the_files_that_contributing_links_are_there():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", read("CONTRIBUTING.md"))
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_contributing_names_the_checks_of_ci():
    text = read("CONTRIBUTING.md")
    commands = [
        line for line in read(".ci/run").splitlines() if line.startswith(".venv/bin/") and "recipes" not in line
    ]
    assert commands
    assert [command for command in commands if command not in text] == []
