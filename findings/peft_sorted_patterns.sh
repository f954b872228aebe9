#!/usr/bin/env bash
# peft 0.21.2: save_pretrained sorts alpha_pattern and rank_pattern, in which the first match decides.
#
# A layer takes the rank and alpha of the first pattern, in the order of the dict, that matches its name. The file of
# save_pretrained has the patterns in alphabetical order, so that a special pattern written before a general one can
# stand after it once saved.
# Expected: from_pretrained(save_pretrained(model)) computes what the model does, as for a dict of any other order.
# Seen:
#   special first, alphas:  scaling of q 4.0 as trained, 0.25 as loaded; differ by 15.3
#   special first, ranks:   RuntimeError on load: size mismatch
#   general first:          differ by 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.24.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.k(self.q(x))


def both(folder, **patterns):
    """A LoRA as it is in memory, and as it is loaded from its own files."""
    model = get_peft_model(Model(), LoraConfig(r=4, lora_alpha=4, target_modules=["q", "k"], **patterns)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return model, PeftModel.from_pretrained(Model(), folder).eval()


def differ(model, loaded):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    return (model(x) - loaded(x)).abs().max().item()


special_first = {"q": 16, ".*": 1}
model, loaded = both("alphas", alpha_pattern=special_first)
scalings = [m.base_model.model.q.scaling["default"] for m in (model, loaded)]
alphas = differ(model, loaded)
print(f"special first, alphas:  scaling of q {scalings[0]} as trained, {scalings[1]} as loaded; differ by {alphas:.1f}")
try:
    both("ranks", rank_pattern={"q": 8, ".*": 2})
    ranks = "loaded"
except RuntimeError as error:
    ranks = "RuntimeError on load: size mismatch" if "size mismatch" in str(error) else str(error)
print(f"special first, ranks:   {ranks}")
general = differ(*both("general", alpha_pattern={".*": 1, "q": 16}))
print(f"general first:          differ by {general}")
sys.exit(not (scalings == [4.0, 0.25] and alphas > 0.1 and ranks.startswith("RuntimeError") and general == 0))
PYTHON
