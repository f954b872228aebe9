"""The tasks of the benchmarks, and the records of their runs."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the form of records that recipes have too

from grids import grid_methods
from json_lines import JsonLines, Record, digest
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


class Store:
    """The records of one task, in ``<folder>/<task>.jsonl``, by method and seed.

    A record counts only while the method's settings are still those of the task file: the latest line with the same
    digest. Others stay in the file, and are passed over.
    """

    def __init__(self, folder: Path, task: str):
        self._lines = JsonLines(folder / f"{task}.jsonl")

    @property
    def path(self) -> Path:
        return self._lines.path

    @property
    def records(self) -> list[Record]:
        """All of the file, the oldest first."""
        return self._lines.all

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
        self._lines.append({"method": method, "digest": digest(record["settings"]), **record})
