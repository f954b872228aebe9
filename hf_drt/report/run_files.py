"""The files of a run folder, found and checked: the Trainer's log, and the state of dynamic-rank training."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_drt.checkpoint import STATE_NAME, CheckpointError, read_state

LOG_NAME = "trainer_state.json"
_WHAT = (
    f"A run is a Trainer's output_dir with a checkpoint-N in it, or with {LOG_NAME}, which trainer.save_state() writes "
    "after trainer.train()."
)
_OTHER = "Give one of the run's checkpoints that is whole: hf-drt report RUN_DIR/checkpoint-N."


class RunError(ValueError):
    """A folder is no run that can be reported on; the message says why, and what to do."""


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of one run.

    Attributes:
        folder: As given.
        log: ``trainer_state.json`` of the furthest step.
        log_path: Where it lies.
        state: ``drt_state.json`` beside it, else of the furthest checkpoint that has one; None for a plain run.
        state_folder: Where that lies.
    """

    folder: Path
    log: dict[str, Any]
    log_path: Path
    state: dict[str, Any] | None = None
    state_folder: Path | None = None


def read_files(folder: Path) -> RunFiles:
    """Find and read the files of a run.

    Args:
        folder: A Trainer's output_dir, or one checkpoint in it.

    Raises:
        RunError: There is no such folder, it is no run, a file is damaged, or of a newer format.
    """
    if not folder.exists():
        raise RunError(f"there is no folder {folder}. {_WHAT}")
    if not folder.is_dir():
        raise RunError(f"{folder} is a file, not the folder of a run. {_WHAT}")
    checkpoints = _checkpoints(folder)
    paths = [place / LOG_NAME for place in (folder, *checkpoints) if (place / LOG_NAME).is_file()]
    if not paths:
        raise RunError(_no_run(folder))
    # The folder's own log comes last, so that it wins a tie with the last checkpoint's: it is written later.
    logs = {path: _read_log(path) for path in (paths[-1], paths[0])}
    path = max(reversed(logs), key=lambda path: logs[path]["global_step"])
    if not any("drt_phase" in row for row in logs[path]["log_history"]):
        return RunFiles(folder, logs[path], path)  # plain; a state there is of an earlier run
    places = [path.parent, *reversed(checkpoints)]
    place = next((place for place in places if (place / STATE_NAME).is_file()), None)
    return RunFiles(folder, logs[path], path, *((None, None) if place is None else (_read_state(place), place)))


def _checkpoints(folder: Path) -> list[Path]:
    """``checkpoint-N`` in a folder, by N."""
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _no_run(folder: Path) -> str:
    text = f"{folder} is not a run: neither it nor a checkpoint-N in it has {LOG_NAME}. {_WHAT}"
    logs = (*folder.glob(f"*/{LOG_NAME}"), *folder.glob(f"*/checkpoint-*/{LOG_NAME}"))
    inside = sorted({path.relative_to(folder).parts[0] for path in logs})
    return f"{text} Runs in it: {', '.join(inside[:8])}." if inside else text


def _read_log(path: Path) -> dict[str, Any]:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}). {_OTHER}") from None
    rows = log.get("log_history") if isinstance(log, dict) else None
    if not isinstance(rows, list) or not isinstance(log.get("global_step"), int):
        raise RunError(f"{path} is damaged (no log_history, or no global_step). {_OTHER}")
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise RunError(f"{path} is damaged (a row of log_history has no step). {_OTHER}")
    return log


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_state(folder)
    except CheckpointError as error:
        raise RunError(f"cannot report on {folder}: {error}") from None
