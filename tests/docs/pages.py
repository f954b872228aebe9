"""The documentation's pages, and every fenced block of code in them with what stands about it in a comment before it.

A comment ``<!-- block: DIRECTIVE, DIRECTIVE -->`` on the lines before a block says:

- ``goes on``: the block is one with the Python block before it on the page, and sees its names.
- ``with NAME`` (several times): a folder, module or file of that name is there, see ``stand_ins.py``.
- ``run``: a block of commands is run, in place of being held against the real parsers alone.
- ``not run because REASON``: nothing of it is checked but its language.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMENT = re.compile(r"<!--\s*block:\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced or indented block; ``language`` is '' where none is given."""

    page: Path
    line: int
    language: str
    text: str
    directives: tuple[str, ...]

    @property
    def name(self) -> str:
        """Where the block stands, as tests and tracebacks show it."""
        return f"{self.page.name}:{self.line}"

    def having(self, word: str) -> list[str]:
        """What follows ``word`` in the directives that begin with it."""
        return [d.removeprefix(word).strip() for d in self.directives if d.split()[: len(word.split())] == word.split()]


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """All blocks of a page, in order."""
    return tuple(_blocks(page, page.read_text(encoding="utf-8")))


def _blocks(page: Path, text: str) -> Iterator[Block]:
    comment = ""
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block"):
            said = (part.strip() for found in _COMMENT.findall(comment) for part in found.split(","))
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(page, token.map[0] + 1, language, token.content, tuple(filter(None, said)))
        comment = token.content if token.type == "html_block" else ""


def all_blocks() -> list[Block]:
    """Those of all pages."""
    return [block for page in PAGES for block in blocks_of(page)]


def chains() -> list[list[Block]]:
    """Python blocks that are one program each: a block and those that go on from it."""
    found: list[list[Block]] = []
    for block in all_blocks():
        if block.language != "python" or block.having("not run"):
            continue
        if block.having("goes on"):
            if not found or found[-1][-1].page != block.page:
                raise AssertionError(f"{block.name} has no block to go on from")
            found[-1].append(block)
        else:
            found.append([block])
    return found
