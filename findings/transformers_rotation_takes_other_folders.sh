#!/usr/bin/env bash
# transformers 5.24.0: the rotation of save_total_limit deletes folders that the Trainer did not write.
#
# Where a file system has modification times, rotate_checkpoints sorts every folder named checkpoint-* by them, and deletes
# the oldest: a checkpoint-best that a callback of the user's has written goes like any other. By number, the way for file
# systems without them, checkpoint-best stays, and a checkpoint-2-backup goes, since only the start of its name is read.
# Expected: only folders checkpoint-<step> that the Trainer has written are counted and deleted.
# Seen:
#   by time:    deleted checkpoint-2-backup, checkpoint-best
#   by number:  deleted checkpoint-2-backup
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints


def deleted(name, by_time):
    """What is gone of two folders of the user's and two of the Trainer's, of which two may stay."""
    folders = {"checkpoint-best": 1e9, "checkpoint-2-backup": 1.1e9, "checkpoint-10": 1.2e9, "checkpoint-20": 1.3e9}
    for folder, seconds in folders.items():
        Path(name, folder).mkdir(parents=True)
        os.utime(Path(name, folder), (seconds, seconds))
    rotate_checkpoints(output_dir=name, save_total_limit=2, use_mtime=by_time)
    return sorted(set(folders) - {path.name for path in Path(name).iterdir()})


by_time, by_number = deleted("time", True), deleted("number", False)
print("by time:    deleted", ", ".join(by_time))
print("by number:  deleted", ", ".join(by_number))
sys.exit(by_time != ["checkpoint-2-backup", "checkpoint-best"] or by_number != ["checkpoint-2-backup"])
PYTHON
