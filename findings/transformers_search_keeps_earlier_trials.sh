#!/usr/bin/env bash
# transformers 5.24.0, optuna 5.0.0: in hyperparameter_search() a training argument that a trial does not suggest keeps
# the value of an earlier trial, and not the one that the user has set; None becomes the text "None" where an earlier
# trial has set a text.
#
# Optuna's spaces are defined by run: which parameters there are may depend on other ones. The Trainer writes what a
# trial suggests into its one TrainingArguments, cast to the type of the value that stands there, and takes nothing back.
# So of a conditional space what a trial trains with depends on the trials before it, and its record in the study does
# not say so.
# Expected: each trial begins with the arguments as the user has given them.
# Seen, weight_decay 0.0 and optim_args None being the user's:
#   trial 0 suggests weight_decay=0.5, optim_args='betas=(0.8,0.9)': trains with 0.5, 'betas=(0.8,0.9)'
#   trial 1 suggests optim_args=None: trains with 0.5, 'None'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate optuna==5.0.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import optuna
import torch
from transformers import Trainer, TrainingArguments

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


def space(trial):
    if trial.number == 0:
        return {
            "weight_decay": trial.suggest_float("weight_decay", 0.5, 0.5),
            "optim_args": trial.suggest_categorical("optim_args", ["betas=(0.8,0.9)"]),
        }
    return {"optim_args": trial.suggest_categorical("none", [None])}


class Seen(Trainer):
    rows = []

    def _inner_training_loop(self, *args, **kwargs):
        Seen.rows.append((self.args.weight_decay, self.args.optim_args))
        self.args.optim_args, kept = None, self.args.optim_args  # what it does to the optimizer is another matter
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.optim_args = kept


data = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(4)]
arguments = TrainingArguments(
    "out", max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no"
)
trainer = Seen(args=arguments, train_dataset=data, eval_dataset=data, model_init=lambda trial=None: Line())
trainer.hyperparameter_search(space, compute_objective=lambda metrics: 0.0, n_trials=2, backend="optuna")
for number, row in enumerate(Seen.rows):
    print(f"trial {number} trains with weight_decay={row[0]}, optim_args={row[1]!r}")
sys.exit(Seen.rows != [(0.5, "betas=(0.8,0.9)"), (0.5, "None")])
PYTHON
