#!/usr/bin/env bash
# transformers 5.24.0, galore-torch 1.0, apollo-torch 1.0.3: optim="galore_adamw" and "apollo_adamw" train without the
# weight_decay of the TrainingArguments; betas and epsilon reach GaLore nowhere, and APOLLO for its target modules alone.
#
# For these the Trainer makes two groups of its own, the target modules and all others, in place of those by decay. GaLore
# is given the learning rate only; APOLLO's target modules get betas and epsilon, all other parameters the defaults of
# the package. Nothing is said. A comparison with adamw_torch under the same TrainingArguments compares other settings.
# Expected: the arguments reach all groups, as they do with adamw_torch, or a message says that they have no effect.
# Seen (of the targets, of the others):
#   adamw_torch:  weight_decay 0.3, betas (0.5, 0.6), eps 0.01 | weight_decay 0.0, betas (0.5, 0.6), eps 0.01 (biases)
#   galore_adamw: weight_decay 0.0, betas (0.9, 0.999), eps 1e-06 | the same
#   apollo_adamw: weight_decay 0.0, betas (0.5, 0.6), eps 0.01 | weight_decay 0.0, betas (0.9, 0.999), eps 1e-06
#   messages about it: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 accelerate==1.15.0 numpy
"$folder/venv/bin/pip" install -q galore-torch==1.0 apollo-torch==1.0.3 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as messages


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


said = []


class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


messages.add_handler(Keep())
messages.set_verbosity_warning()
found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("adamw_torch", "galore_adamw", "apollo_adamw"):
        args = TrainingArguments(
            "out", optim=name, optim_target_modules=["block"], use_cpu=True, report_to="none",
            weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.01,
        )
        model = Model()
        groups = Trainer(model, args).create_optimizer().param_groups
        found[name] = [
            next((g["weight_decay"], g["betas"], g["eps"]) for g in groups if any(p is weight for p in g["params"]))
            for weight in (model.block.weight, model.head.bias)
        ]
about = [text for text in [*said, *(str(w.message) for w in caught)] if "decay" in text or "adam_" in text]
for name, settings in found.items():
    print(f"{name}:", " | ".join("weight_decay {}, betas {}, eps {}".format(*values) for values in settings))
print("messages about it:", len(about))
own, given = (0.0, (0.9, 0.999), 1e-06), ((0.5, 0.6), 0.01)
expected = {
    "adamw_torch": [(0.3, *given), (0.0, *given)],
    "galore_adamw": [own, own],
    "apollo_adamw": [(0.0, *given), own],
}
if found != expected or about:
    sys.exit("the behaviour has changed")
PYTHON
