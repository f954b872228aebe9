"""What lies where this package writes, and is not its own: moved aside under another name, never deleted.

An adapter's files beside those of a whole model would be loaded together with them, so that a save in one form clears
those of another. Which files a form has its exporter says. Whose they are is known from what they hold: this process
remembers what it has written, and an adapter's base carries a record of it, :data:`RECORD`, for the processes after
this one.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_drt.registry import EXPORTERS

logger = logging.getLogger(__name__)

BASE_FOLDER = "base"  # of an adapter, inside its own folder
RECORD = "drt_files.json"  # in the base: what was written together with it
WHOLE_MODEL_FILES = (
    CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-?????-of-?????.safetensors",
)  # fmt: skip
_BASE_FILES = tuple(f"{BASE_FOLDER}/{name}" for name in WHOLE_MODEL_FILES)

_END = 2**20  # bytes at each end of a file that tell it from another of the same size
_written: dict[Path, str] = {}  # by this process: absolute path -> print of the content


def model_files() -> tuple[str, ...]:
    """Patterns of the files that hold a model in the form of any exporter."""
    files = dict.fromkeys(pattern for exporter in EXPORTERS.values() for pattern in exporter.files)
    return (*files, *_BASE_FILES, f"{BASE_FOLDER}/{RECORD}")


def set_aside(path: Path) -> Path:
    """Rename a file or folder to ``_NAME.kept``, or ``_NAME.kept-2`` and so on if that is taken; the new path.

    No loader takes such a name, the Trainer's rotation does not count it, and no push takes it along.
    """
    number, kept = 1, path.with_name(f"_{path.name}.kept")
    while kept.exists() or kept.is_symlink():
        number += 1
        kept = path.with_name(f"_{path.name}.kept-{number}")
    path.rename(kept)
    logger.warning("%s is not of this run, and stood where it writes: it was moved to %s.", path, kept.name)
    return kept


class ModelFiles:
    """The files of a model in a folder, from before to after a save.

    Args:
        folder: Where the model is about to be saved.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._record = folder / BASE_FOLDER / RECORD
        self._recorded = _read(self._record)
        self._before = _prints(folder)

    def make_room(self, files: Sequence[str]) -> None:
        """Before an adapter, of these files, and its base are written: what they would write over, and is somebody
        else's."""
        base = self._folder / BASE_FOLDER
        if base.is_symlink() or base.is_file() or not all(map(self._is_own, _found(self._folder, _BASE_FILES))):
            set_aside(base)
            self._recorded = None
        for path in _found(self._folder, files):
            if not self._is_own(path):
                set_aside(path)
        self._before = _prints(self._folder)
        base.mkdir(parents=True, exist_ok=True)
        self._write_record(None)

    def settle(self, files: Sequence[str], has_base: bool) -> None:
        """After the save, which was of these files, with a base or without: what is left of other forms goes."""
        others = {pattern for exporter in EXPORTERS.values() for pattern in exporter.files} - set(files)
        stale = _found(self._folder, sorted(others))
        if not has_base and self._recorded is not None:
            stale += [path for path in _found(self._folder, _BASE_FILES) if self._is_own(path)] + [self._record]
        for path in stale:
            if path == self._record or self._is_own(path):
                path.unlink(missing_ok=True)
            else:
                set_aside(path)
        self._remember(has_base)

    def _is_own(self, path: Path) -> bool:
        """Whether the file holds what this package has written there; in a base that was left unfinished, anything."""
        recorded, name = self._recorded or {}, path.relative_to(self._folder).as_posix()
        if path.is_symlink():
            return False
        if recorded.get("unfinished") and path.parent.name == BASE_FOLDER:
            return True
        return _print(path) in (_written.get(path.absolute()), recorded.get(name))

    def _remember(self, has_base: bool) -> None:
        """What the save has changed is its own."""
        now = _prints(self._folder)
        own = {name: text for name, text in now.items() if self._is_own(self._folder / name)}
        own |= {name: text for name, text in now.items() if self._before.get(name) != text}
        _written.update({(self._folder / name).absolute(): text for name, text in own.items()})
        if has_base:
            self._write_record(own)

    def _write_record(self, own: dict[str, str] | None) -> None:
        """None while the files are being written."""
        record = {"unfinished": True} if own is None else own
        self._record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file() or path.is_symlink()]


def _prints(folder: Path) -> dict[str, str]:
    found = _found(folder, [name for name in model_files() if name != f"{BASE_FOLDER}/{RECORD}"])
    return {path.relative_to(folder).as_posix(): _print(path) for path in found}


def _print(path: Path) -> str:
    """Size, and a digest of both ends: weights that were trained further differ in every block."""
    size = path.stat().st_size if path.is_file() else 0
    if not size:
        return "empty"
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END))
        file.seek(max(size - _END, 0))
        digest.update(file.read(_END))
    return f"{size}-{digest.hexdigest()}"


def _read(record: Path) -> dict[str, Any] | None:
    """What an earlier process has written, by :data:`RECORD`; None where there is none that can be read."""
    try:
        content = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
