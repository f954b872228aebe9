#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0, transformers 5.24.0: a setting of one weight is applied to weights of other models.
#
# GlobalOptimManager.register_module_override(module, "weight", {...}) gives one weight settings of its own. The Trainer
# calls it with optim=adamw_8bit, so that embeddings keep their state in 32 bits. As the first optimizer is made, the
# setting is filed once more under the weight's place, (group, index in the group), and every optimizer of the process
# looks there first. A later model that has another weight in that place gets the setting too: in a search over
# hyperparameters, a notebook, or a script with a second model, a linear layer has a state four times as large.
# Expected: the setting is that of the weight that was registered.
# Seen (dtype of the first moment of a linear layer's weight):
#   before any override: torch.uint8
#   the embedding that was registered: torch.float32
#   a linear layer of another model, made later: torch.float32
#   the linear layer first in its group, trained by a Trainer in a process of its own: torch.uint8
#   the same after a Trainer that had an embedding there: torch.float32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy bitsandbytes==0.50.2
cd "$folder"
cat > linear_and_embedding.py <<'PYTHON'
import sys

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return {"loss": self.layer(torch.nn.functional.one_hot(x, 128).float()).square().mean()}


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(128, 64)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def trained(model):
    """Dtype of the first moment of the layer's weight after one step."""
    args = TrainingArguments(
        "out", optim="adamw_8bit", use_cpu=True, max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=[{"x": 3}] * 8)
    trainer.train()
    return trainer.optimizer.optimizer.state[model.layer.weight]["state1"].dtype


if "after" in sys.argv:
    trained(Embedding())
print(trained(Linear()))
PYTHON
alone=$("$folder/venv/bin/python" linear_and_embedding.py 2>/dev/null | tail -1)
after=$("$folder/venv/bin/python" linear_and_embedding.py after 2>/dev/null | tail -1)
"$folder/venv/bin/python" - "$alone" "$after" <<'PYTHON'
import sys

import torch
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
from torch import nn


def first_moment(model, x):
    """Its dtype after one step."""
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    return optimizer.state[model.weight]["state1"].dtype


before = first_moment(nn.Linear(128, 64, bias=False), torch.randn(4, 128))
embedding = nn.Embedding(128, 64)
GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
registered = first_moment(embedding, torch.tensor([3]))
other = first_moment(nn.Linear(128, 64, bias=False), torch.randn(4, 128))
alone, after = sys.argv[1:]
print(f"before any override: {before}")
print(f"the embedding that was registered: {registered}")
print(f"a linear layer of another model, made later: {other}")
print(f"the linear layer first in its group, trained by a Trainer in a process of its own: {alone}")
print(f"the same after a Trainer that had an embedding there: {after}")
seen = [str(before), str(registered), str(other), alone, after]
sys.exit(seen != ["torch.uint8", "torch.float32", "torch.float32", "torch.uint8", "torch.float32"])
PYTHON
