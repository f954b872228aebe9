#!/usr/bin/env bash
# grokadamw 0.1.2, torch 2.13.0, transformers 5.24.0: a resumed run begins with moments of zero, and a weight's place in
# its parameter group decides the size of its first updates.
#
# GrokAdamW keeps its moments in group["state"], under the parameters themselves, not in optimizer.state. A checkpoint
# holds them, and loads without an error or a warning; but the parameters of the new process are other objects, so that
# none is found, and every moment and step count begins anew. With optim=grokadamw, resume_from_checkpoint then trains
# differently from the run that it resumes.
# beta1 is multiplied by 0.9 for every parameter that stands before in the group, while the bias correction goes by the
# whole beta1: the first update of the 30th weight is 9.6 times as large as that of the first, with the same gradient.
# The Trainer puts all weights with decay into one group, so that this holds for the last layers of every model.
# Expected: a resumed run goes on with its moments, as with adamw_torch; all weights make first updates of one size.
# Seen:
#   adamw_torch: resumed and undisturbed run end with equal weights: True
#   grokadamw:   resumed and undisturbed run end with equal weights: False, largest difference 0.0004
#   grokadamw:   steps that a weight counts after 2 steps, a resume and 1 step: 1
#   grokadamw:   first updates of 30 equal weights, over that of the first: 2nd 1.9, 10th 6.5, 30th 9.6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy
"$folder/venv/bin/pip" install -q --no-deps grokadamw==0.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2> errors || { cat errors; exit 1; }
import sys

import torch
from grokadamw import GrokAdamW
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return {"loss": (self.layer(x) - 1).square().mean()}


class StopAt2(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def trainer(optim, folder, callbacks=()):
    args = TrainingArguments(
        folder, optim=optim, use_cpu=True, max_steps=4, learning_rate=0.01, save_steps=2, report_to="none",
        disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=1,
    )
    data = [{"x": torch.full((4,), float(i % 3))} for i in range(16)]
    return Trainer(Model(), args, train_dataset=data, callbacks=list(callbacks))


def difference(optim):
    """Largest difference of a weight between a run of 4 steps and one that is stopped after 2 and resumed."""
    whole = trainer(optim, f"{optim}-whole")
    whole.train()
    trainer(optim, f"{optim}-parts", [StopAt2()]).train()
    resumed = trainer(optim, f"{optim}-parts")
    resumed.train(resume_from_checkpoint=f"{optim}-parts/checkpoint-2")
    return (whole.model.layer.weight - resumed.model.layer.weight).abs().max().item()


def count_after_resume():
    """Steps that a weight counts after two steps, saving, loading and one more."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([weight])
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
    torch.save(optimizer.state_dict(), "optimizer.pt")
    weight = nn.Parameter(weight.detach().clone())
    resumed = GrokAdamW([weight])
    resumed.load_state_dict(torch.load("optimizer.pt", weights_only=True))
    weight.grad = torch.ones(3)
    resumed.step()
    return next(s["step"] for p, s in resumed.param_groups[0]["state"].items() if p is weight)


def first_updates():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(30)]
    optimizer = GrokAdamW(weights, lr=1e-3, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    return [(1 - weight)[0].item() for weight in weights]


plain, grok, count, sizes = difference("adamw_torch"), difference("grokadamw"), count_after_resume(), first_updates()
ratios = [round(sizes[place - 1] / sizes[0], 1) for place in (2, 10, 30)]
print(f"adamw_torch: resumed and undisturbed run end with equal weights: {plain == 0}")
print(f"grokadamw:   resumed and undisturbed run end with equal weights: {grok == 0}, largest difference {grok:.4f}")
print(f"grokadamw:   steps that a weight counts after 2 steps, a resume and 1 step: {count}")
print(f"grokadamw:   first updates of 30 equal weights, over that of the first: 2nd {ratios[0]}, 10th {ratios[1]}, 30th {ratios[2]}")
sys.exit(not (plain == 0 and grok > 1e-4 and count == 1 and ratios[2] > 5))
PYTHON
