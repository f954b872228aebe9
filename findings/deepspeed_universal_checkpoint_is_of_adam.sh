#!/usr/bin/env bash
# deepspeed 0.19.8: checkpoints of optimizers other than Adam's kind cannot be made "universal".
#
# A universal checkpoint is DeepSpeed's way to go on with another number of processes. Its conversion takes exp_avg and
# exp_avg_sq of every flat tensor by these names, so that the state of any optimizer that names its state otherwise ends
# it, at stages 1 to 3. Documentation and error name no such limit.
# Expected: the conversion carries whatever state there is, or says which optimizers it knows.
# Seen (one process, gloo, one nn.Linear, a step, save_checkpoint(), ds_to_universal):
#   Adam (torch.optim.AdamW)                    converted; at stage 3 without the count of steps
#   SGD with momentum (momentum_buffer)         KeyError: 'exp_avg', at all stages
#   RMSprop (square_avg)                        KeyError: 'exp_avg', at all stages
#   SGD without momentum, which has no state    KeyError: 'exp_avg' at stages 1 and 2, KeyError: 0 at stage 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy setuptools wheel
"$folder/venv/bin/pip" install -q --no-build-isolation deepspeed==0.19.8
cd "$folder"
cat > universal.py <<'PYTHON'
import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import torch
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
import deepspeed
from deepspeed.checkpoint import ds_to_universal

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}


def saved(stage, name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, optimizer=OPTIMIZERS[name](model.parameters()), config=config)[0]
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    folder = Path(f"{stage}-{name}".replace(" ", "-"))
    engine.save_checkpoint(str(folder), tag="step")
    engine.destroy()
    return folder


def converted(folder):
    arguments = argparse.Namespace(
        input_folder=str(folder / "step"), output_folder=str(folder / "universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except KeyError as error:
        return f"KeyError: {error}"
    return " ".join(sorted(path.stem for path in (folder / "universal" / "zero" / "0.weight").iterdir()))


EXPECTED = {
    "AdamW": {1: "exp_avg exp_avg_sq fp32 step", 2: "exp_avg exp_avg_sq fp32 step", 3: "exp_avg exp_avg_sq fp32"},
    "SGD with momentum": dict.fromkeys((1, 2, 3), "KeyError: 'exp_avg'"),
    "RMSprop": dict.fromkeys((1, 2, 3), "KeyError: 'exp_avg'"),
    "SGD": {1: "KeyError: 'exp_avg'", 2: "KeyError: 'exp_avg'", 3: "KeyError: 0"},
}
wrong = False
for name in OPTIMIZERS:
    for stage in (1, 2, 3):
        seen = converted(saved(stage, name))
        print(f"stage {stage}, {name}: {seen}")
        wrong |= EXPECTED[name][stage] != seen
sys.exit(wrong)
PYTHON
"$folder/venv/bin/python" universal.py 2>&1 | grep -v "INFO\|WARNING\|deprecated\|return func"
