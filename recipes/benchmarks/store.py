"""Records of runs, as JSON lines: what makes a benchmark resumable, and its tables reproducible."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grids import grid_methods
from tuning import tuned_methods

HERE = Path(__file__).parent


def task_file(name: str) -> dict[str, Any]:
    """The task of a name: ``tasks/<name>.json``, its grids and tuned methods turned into methods.

    Raises:
        ValueError: There is none, it is no JSON, it lacks a section, or a grid is malformed.
    """
    path = HERE / "tasks" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise ValueError(f"no task is named {name!r}; there are {known}.")
    try:
        task = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if missing := {"kind", "model", "data", "training", "measure", "methods"} - set(task):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    made = grid_methods(name, task.get("grid", {}))
    if "tuned" in task:
        made |= tuned_methods(name, task["tuned"], task["training"]["max_steps"])
    if twice := set(made) & set(task["methods"]):
        raise ValueError(f"methods and grids of {path} both have {', '.join(sorted(twice))}. Rename one.")
    return task | {"methods": task["methods"] | made}


def digest(settings: dict[str, Any]) -> str:
    """Identity of a run: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Store:
    """The records of one task, in ``<folder>/<task>.jsonl``, by method and seed.

    A record counts only while the method's settings are still those of the task file: the latest line with the same
    digest. Others stay in the file, and are passed over.
    """

    def __init__(self, folder: Path, task: str):
        self.path = folder / f"{task}.jsonl"
        self.records = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"line {number} of {self.path} is no JSON. Delete it, and run again.") from None
                # The last line of a run that was killed while it wrote.

    def find(self, method: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a run, or None."""
        found = self.all_of(method, settings)
        return found[-1] if found else None

    def all_of(self, method: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """All records of a run, the oldest first."""
        wanted = digest(settings)
        return [r for r in self.records if r["method"] == method and r["digest"] == wanted]

    def add(self, method: str, record: dict[str, Any]) -> None:
        """Append a record."""
        record = {"method": method, "digest": digest(record["settings"]), **_rounded(record)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.is_file() else ""
        with self.path.open("a") as file:
            file.write("" if text.endswith("\n") or not text else "\n")
            file.write(json.dumps(record) + "\n")
        self.records.append(record)


def _rounded(value: Any) -> Any:
    """Six digits: more would be noise, and three times the file."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: value[key] if key == "settings" else _rounded(value[key]) for key in value}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value
