"""Links of the README and of docs/ lead somewhere, and the settings that the pages name exist."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from pages import PAGES, ROOT

from hf_drt import DRTConfig

PROJECT = "https://github.com/hf-drt/hf_drt"
LOGGED = set(re.findall(r'"drt_(\w+)', "".join(p.read_text() for p in (ROOT / "hf_drt").rglob("*.py"))))


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    found = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            found += [value for key in ("href", "src") if isinstance(value := child.attrGet(key), str)]
    return found


@cache
def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, by GitHub's rule and by the site's alike."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in links(page):
        if re.match(r"https?:", link):
            assert link.startswith(("https://arxiv.org/abs/", PROJECT)), f"{page.name}: {link}"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    linked = {Path(link.partition("#")[0]).name for link in links(ROOT / "README.md")}
    assert [page.name for page in PAGES if page.parent == ROOT / "docs" and page.name not in linked] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    """``drt_rank`` in code, ``--drt_rank`` in commands; keys of the log are looked for in the sources."""
    known = {f.name for f in fields(DRTConfig)} | LOGGED | {"state", "resume"}  # the latter of hf_drt.run alone
    named = set(re.findall(r"(?<![\w.])drt_(\w*[a-z])", page.read_text(encoding="utf-8")))
    assert named - known == set()


def test_every_recipe_has_a_row():
    text = (ROOT / "docs" / "recipes.md").read_text()
    programs = [p.name for p in (ROOT / "recipes").glob("*.py") if "__main__" in p.read_text()]
    assert programs
    assert [name for name in programs if f"`recipes/{name}`" not in text] == []
