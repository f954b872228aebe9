#!/usr/bin/env bash
# transformers 5.24.0: optim="adafactor" ignores optim_args without a word, relative_step=True for example.
#
# get_optimizer_cls_and_kwargs parses optim_args for every optimizer, and only some read what was parsed: sgd takes its
# momentum from there, adafactor (relative_step and scale_parameter are set to False) and adamw_torch take nothing. A
# name that no optimizer has passes likewise.
# Expected: the argument reaches the optimizer, or an error or a warning says that it has no effect.
# Seen:
#   adafactor,   relative_step=True: the optimizer has False, messages about it: 0
#   adafactor,   clip_threshold=7.0: the optimizer has 1.0, messages about it: 0
#   adafactor,   no_such_setting=1: the optimizer has None, messages about it: 0
#   adamw_torch, eps=0.5: the optimizer has 1e-08, messages about it: 0
#   sgd,         momentum=0.9: the optimizer has 0.9, messages about it: 0
#   settings are those without optim_args: True, but for sgd False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings

import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

lines = []
keep = logging.Handler()
keep.emit = lambda record: lines.append(record.getMessage())
transformers.logging.add_handler(keep)
transformers.logging.set_verbosity_info()
transformers.logging.disable_default_handler()


def group(optim, optim_args):
    """The settings of the optimizer that the Trainer makes, and what was said meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = TrainingArguments("out", optim=optim, optim_args=optim_args, use_cpu=True, report_to="none")
        optimizer = Trainer(nn.Linear(2, 2), args).create_optimizer()
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return settings, [str(w.message) for w in caught] + lines


same, silent = {}, True
for optim, name, value in (
    ("adafactor", "relative_step", "True"),
    ("adafactor", "clip_threshold", "7.0"),
    ("adafactor", "no_such_setting", "1"),
    ("adamw_torch", "eps", "0.5"),
    ("sgd", "momentum", "0.9"),
):
    lines.clear()
    (without, _), (given, said) = group(optim, None), group(optim, f"{name}={value}")
    about = sum(name in line or "optim_args" in line for line in said)
    print(f"{optim + ',':12} {name}={value}: the optimizer has {given.get(name)}, messages about it: {about}")
    same.setdefault(optim, []).append(given == without)
    silent = silent and about == 0
ignored, sgd = all(same["adafactor"] + same["adamw_torch"]), all(same["sgd"])
print(f"settings are those without optim_args: {ignored}, but for sgd {sgd}")
sys.exit(not (ignored and not sgd and silent))
PYTHON
