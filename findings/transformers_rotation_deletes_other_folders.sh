#!/usr/bin/env bash
# transformers 5.24.0: save_total_limit deletes a folder of the user, checkpoint-best, as if the Trainer had written it.
#
# rotate_checkpoints takes every folder whose name begins with checkpoint- for a checkpoint when it sorts by time, which
# is what the Trainer has it do; sorted by step, a name without a number does not count. A copy of a good checkpoint,
# kept under the name checkpoint-best, is deleted at the first save of the next run, and no log line says so.
# Expected: only checkpoint-<step>, the form of name that the Trainer writes, counts and is deleted.
# Seen:
#   after the first run, and a copy:  checkpoint-2 checkpoint-best copy-best
#   sort_checkpoints by step:         checkpoint-2
#   sort_checkpoints by time:         checkpoint-best checkpoint-2
#   after the second run, limit 1:    checkpoint-4 copy-best
#   log lines that name it:           0, checkpoint-4: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

lines = []
keep = logging.Handler()
keep.emit = lambda record: lines.append(record.getMessage())
transformers.logging.set_verbosity_info()
transformers.logging.disable_default_handler()
transformers.logging.add_handler(keep)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


def train(max_steps, resume):
    args = TrainingArguments(
        "out",
        use_cpu=True,
        max_steps=max_steps,
        save_steps=2,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(Model(), args, train_dataset=[{"x": 1.0}] * 64)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def folders():
    return " ".join(sorted(path.name for path in Path("out").iterdir() if path.is_dir()))


def counted(by_time):
    return " ".join(Path(path).name for path in sort_checkpoints("out", use_mtime=by_time))


train(2, resume=None)
for name in ("checkpoint-best", "copy-best"):  # what a user keeps, made an hour before the next run
    shutil.copytree("out/checkpoint-2", f"out/{name}")
    os.utime(f"out/{name}", (time.time() - 3600,) * 2)
before, by_step, by_time = folders(), counted(False), counted(True)
train(4, resume="out/checkpoint-2")
after = folders()
named, others = (sum(name in line for line in lines) for name in ("checkpoint-best", "checkpoint-4"))
print("after the first run, and a copy: ", before)
print("sort_checkpoints by step:        ", by_step)
print("sort_checkpoints by time:        ", by_time)
print("after the second run, limit 1:   ", after)
print(f"log lines that name it:           {named}, checkpoint-4: {others}")
as_before = (before, by_step, by_time, after, named) == (
    "checkpoint-2 checkpoint-best copy-best",
    "checkpoint-2",
    "checkpoint-best checkpoint-2",
    "checkpoint-4 copy-best",
    0,
)
sys.exit(not (as_before and others > 0))
PYTHON
