#!/usr/bin/env bash
# transformers 5.24.0, schedulefree 1.4.1: with a schedule-free optimizer the Trainer saves other weights than it
# evaluates, unless it has evaluated just before.
#
# Schedule-free optimizers train at y and make the average x, which optimizer.eval() puts into the parameters. The
# Trainer calls optimizer.eval() in its evaluation loop alone, and optimizer.train() in every training step. So
# save_model() after train() writes y; after an evaluation it writes x. The same holds for checkpoints: whether
# eval_steps falls on save_steps decides which of the two a checkpoint has, and load_best_model_at_end loads it.
# Expected: what is saved is what evaluate() scores, x, or a warning says that it is not.
# Seen:
#   loss that evaluate() gives:                     3.38
#   loss of what save_model() wrote before it:      3.65
#   loss of what save_model() wrote after it:       3.38
#   warnings that name the optimizer or its mode: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 schedulefree==1.4.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

lines = []
keep = logging.Handler()
keep.emit = lambda record: lines.append(record.getMessage())
transformers.logging.add_handler(keep)
transformers.logging.disable_default_handler()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x, labels):
        return {"loss": (x @ self.weight - labels).square().mean()}


torch.manual_seed(0)
X = torch.randn(256, 8)
Y = X @ torch.arange(8.0) + 2 * torch.randn(256)
data = [{"x": x, "labels": y} for x, y in zip(X, Y)]
args = TrainingArguments(
    "out", optim="schedule_free_adamw", learning_rate=0.5, max_steps=200, lr_scheduler_type="constant", use_cpu=True,
    per_device_train_batch_size=4, per_device_eval_batch_size=256, save_strategy="no", report_to="none",
    disable_tqdm=True, logging_strategy="no",
)
trainer = Trainer(Model(), args, train_dataset=data, eval_dataset=data)
trainer.remove_callback(PrinterCallback)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer.train()
    trainer.save_model("before")
    score = trainer.evaluate()["eval_loss"]
    trainer.save_model("after")


def loss(folder):
    model = Model()
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    with torch.no_grad():
        return model(X, Y)["loss"].item()


before, after = loss("before"), loss("after")
said = [line for line in [str(w.message) for w in caught] + lines if "optimizer" in line or "schedule" in line.lower()]
print(f"loss that evaluate() gives:                     {score:.2f}")
print(f"loss of what save_model() wrote before it:      {before:.2f}")
print(f"loss of what save_model() wrote after it:       {after:.2f}")
print(f"warnings that name the optimizer or its mode: {len(said)}")
sys.exit(not (abs(after - score) < 1e-4 and abs(before - score) > 0.1 and not said))
PYTHON
