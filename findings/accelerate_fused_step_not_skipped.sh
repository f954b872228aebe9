#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0, transformers 5.24.0: a fused optimizer never reports a step that was skipped.
#
# GradScaler skips the update when a gradient is infinite. AcceleratedOptimizer sees that by whether the scaler called
# the optimizer's step. For a fused optimizer the scaler always calls it and passes found_inf, and the kernel leaves the
# weights alone; accelerate takes the call for an update. The Trainer moves its learning rate on unless
# optimizer_step_was_skipped, so adamw_torch_fused, its default, and adamw_torch train with other rates.
# Expected: optimizer_step_was_skipped is True whenever the update was skipped, as for an optimizer that is not fused.
# (accelerate makes a scaler only for an accelerator's float16; the same scaler is put in here, on the CPU.)
# Seen:
#   accelerate, fused=False: gradient inf, weight 1.0 -> 1.0, skipped: True, rate of the scheduler 0.1
#   accelerate, fused=True:  gradient inf, weight 1.0 -> 1.0, skipped: False, rate of the scheduler 0.05
#   after each of four steps, the first of which overflows:
#   Trainer, adamw_torch:       weights 1.000 0.900 0.825 0.775, rates 0.100 0.075 0.050 0.025
#   Trainer, adamw_torch_fused: weights 1.000 0.925 0.875 0.850, rates 0.075 0.050 0.025 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


def accelerated(fused):
    """Whether one step is reported as skipped, the weight and the rate after it."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    optimizer, scheduler = accelerator.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    accelerator.scaler.scale(weight.sum()).backward()
    weight.grad[0] = float("inf")
    optimizer.step()
    scheduler.step()
    return accelerator.optimizer_step_was_skipped, weight.item(), scheduler.get_last_lr()[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


class Record(TrainerCallback):
    def __init__(self):
        self.weights, self.rates = [], []

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.weights.append(model.weight.item())
        self.rates.append(lr_scheduler.get_last_lr()[0])


def trained(optim):
    """Weights and rates after each of four steps, the first of which overflows: scale * x = 2^127 * 2."""
    args = TrainingArguments(
        "out",
        optim=optim,
        use_cpu=True,
        max_steps=4,
        learning_rate=0.1,
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    seen = Record()
    trainer = Trainer(Model(), args, train_dataset=[{"x": 2.0}] * 32, callbacks=[seen])
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    return seen


plain, fused = accelerated(False), accelerated(True)
for name, (skipped, weight, rate) in (("fused=False:", plain), ("fused=True: ", fused)):
    print(f"accelerate, {name} gradient inf, weight 1.0 -> {weight}, skipped: {skipped}, rate of the scheduler {rate}")
runs = {optim: trained(optim) for optim in ("adamw_torch", "adamw_torch_fused")}
print("after each of four steps, the first of which overflows:")
for optim, run in runs.items():
    weights, rates = (" ".join(format(v, ".3f") for v in values) for values in (run.weights, run.rates))
    print(f"Trainer, {optim + ':':18} weights {weights}, rates {rates}")
first = [(run.weights[0], round(run.rates[0], 6)) for run in runs.values()]
last = [run.weights[-1] for run in runs.values()]
as_before = plain == (True, 1.0, 0.1) and fused == (False, 1.0, 0.05)
sys.exit(not (as_before and first == [(1.0, 0.1), (1.0, 0.075)] and abs(last[0] - last[1]) > 0.01))
PYTHON
