"""What is made once and kept in a cache folder: there complete or not at all, also where two runs make it at once."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Gives a path to write a file or a folder at, of the same suffix, which takes its place at the end; where another
    process was first, that one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if not part.is_dir():
            part.replace(path)
        elif not path.exists():
            try:
                part.rename(path)
            except OSError:  # not empty: another process has come in between
                if not path.is_dir():
                    raise
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
