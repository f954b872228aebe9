"""What the site has beside the pages: API pages, made of the packages' faces, and links out of docs/ to the repository.

A page is written so that it reads on the repository's own site as well: a link to a file beside ``docs/`` is relative
there, and becomes an address here.
"""

import posixpath
import re
from functools import cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The API pages at the end of the navigation."""
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in faces()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """An API page for every face."""
    for name, members in faces().items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name, members)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/, as addresses in the repository."""

    def address(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if not (ROOT / path).exists():
            return match[0]  # which the strict build reports
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{match[1]}{config.repo_url}/{kind}/main/{path}{match[3] or ''})"

    return _LINK.sub(address, markdown)


@cache
def faces() -> dict[str, list[str]]:
    """Dotted name -> documented names of ``__all__``, of hf_drt and of every package and module in it that has one."""
    root = griffe.load("hf_drt", search_paths=[str(ROOT)], try_relative_path=False)
    units = [root, *(module for _, module in sorted(root.modules.items()) if not module.is_alias)]
    return {unit.path: names for unit in units if (names := [n for n in unit.exports or [] if _documented(unit, n)])}


def _documented(unit: griffe.Module, name: str) -> bool:
    """Constants need no page where nothing is said of them; classes and functions have one in any case."""
    try:
        member = unit[name].final_target if unit[name].is_alias else unit[name]
    except griffe.AliasResolutionError:  # names assigned together, which griffe does not follow
        return False
    return member.has_docstring or not member.is_attribute


def api_page(name: str, members: list[str]) -> str:
    """The package's own docstring, then each of its public names."""
    head = f"# {name}\n\n::: {name}\n    options:\n      members: false\n      show_root_heading: false\n"
    return head + "".join(f"\n::: {name}.{member}\n" for member in members)
