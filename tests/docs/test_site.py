"""The site is built without a warning, and its API pages have every public name."""

import logging
import os
from pathlib import Path

import hooks
import pytest
from pages import ROOT

import hf_drt

os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
from mkdocs.commands.build import build
from mkdocs.config import load_config


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site; in a strict build a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        build(config)
    finally:
        os.chdir(here)
        logging.getLogger("mkdocs").setLevel(logging.WARNING)
    return folder


def test_every_page_is_built(site):
    for page in (ROOT / "docs").glob("*.md"):
        name = "" if page.stem == "index" else page.stem
        assert (site / name / "index.html").is_file()


def test_every_public_name_is_in_the_api(site):
    html = (site / "api" / "hf_drt" / "index.html").read_text()
    assert hooks.faces()["hf_drt"] == hf_drt.__all__
    assert [name for name in hf_drt.__all__ if f'id="hf_drt.{name}"' not in html] == []


def test_roles_of_docstrings_are_links(site):
    for page in (site / "api").rglob("index.html"):
        assert ":class:`" not in page.read_text(), page
    forms = (site / "api" / "hf_drt" / "index.html").read_text()
    assert '<a class="autorefs autorefs-internal"' in forms


def test_links_out_of_the_pages_are_addresses(site):
    html = (site / "index.html").read_text()
    assert 'href="https://github.com/hf-drt/hf_drt/blob/main/recipes/benchmarks/RESULTS.md"' in html
