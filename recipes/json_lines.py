"""Records as JSON lines, which a run adds to: what makes it resumable, and its tables reproducible."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def digest(settings: Record) -> str:
    """Identity of a run: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class JsonLines:
    """The records of a file, one a line; the last line of a run that was killed while it wrote is passed over.

    Attributes:
        all: They, the oldest first.

    Raises:
        ValueError: Another line is no JSON.
    """

    def __init__(self, path: Path):
        self.path = path
        self.all = list(self._read())

    def _read(self) -> Iterator[Record]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"line {number} of {self.path} is no JSON. Delete it, and run again.") from None

    def append(self, record: Record) -> Record:
        """Write a record at the end, its results rounded to six digits; what was written."""
        record = {key: value if key == "settings" else _rounded(value) for key, value in record.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.is_file() else ""
        with self.path.open("a") as file:
            file.write("" if text.endswith("\n") or not text else "\n")
            file.write(json.dumps(record) + "\n")
        self.all.append(record)
        return record


def _rounded(value: Any) -> Any:
    """More would be noise, and three times the file."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value
