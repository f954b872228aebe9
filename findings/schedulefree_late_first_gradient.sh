#!/usr/bin/env bash
# schedulefree 1.4.1, torch 2.13.0: a weight whose first gradient comes late makes a first step of up to 32 rates.
#
# AdamWScheduleFree corrects the bias of the second moment by the number of steps of the parameter group, while a
# weight's moment begins at zero with its first gradient. At step 1 both cancel, and the iterate z moves by lr. A weight
# that is unfrozen at step 3,000 (gradual unfreezing, an expert that gets its first token) has v = (1 - beta2) g^2,
# corrected by 1 - beta2^3000 = 0.95, so that z moves by lr / sqrt(1 - beta2), 31 times as far, and the next steps are
# large too. Clipping does not help, since a step does not depend on the gradient's size. torch.optim.AdamW counts the
# steps of each weight. A parameter group of its own, made when the weight is unfrozen, begins its count at 0.
# Expected: the first step of a weight is at most the rate, whenever it comes, as with torch.optim.AdamW.
# Seen, in rates: the first step of z, and how far it is after 100 steps with one and the same gradient
#   unfrozen at step    0: schedule-free  1.0 and 100, in a group of its own 1.0 and 100, torch's AdamW 1.0 and 100
#   unfrozen at step  300: schedule-free 16.1 and 317, in a group of its own 1.0 and 100, torch's AdamW 1.0 and 100
#   unfrozen at step 3000: schedule-free 30.8 and 579, in a group of its own 1.0 and 100, torch's AdamW 1.0 and 100
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q schedulefree==1.4.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from schedulefree import AdamWScheduleFree
from torch import nn

LR = 1e-3


def moved(kind, at, own_group=False):
    """How far the iterate of a weight that is frozen until step ``at`` is after 1 and 100 steps more, in rates."""
    early, late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = kind([early] if own_group else [early, late], lr=LR, weight_decay=0.0)
    found = []
    for step in range(at + 100):
        if step == at:
            late.requires_grad_(True)
            if own_group:
                optimizer.add_param_group({"params": [late]})
        if kind is AdamWScheduleFree:
            optimizer.train()
        optimizer.zero_grad()
        (early.square().sum() + 3 * late.sum()).backward()
        optimizer.step()
        if step >= at:
            found.append((1 - optimizer.state[late].get("z", late.detach())).max().item() / LR)
    return found[0], found[-1]


as_before = True
for at, expected in ((0, 1.0), (300, 16.1), (3000, 30.8)):
    shared, own = moved(AdamWScheduleFree, at), moved(AdamWScheduleFree, at, own_group=True)
    torchs = moved(torch.optim.AdamW, at)
    print(
        f"unfrozen at step {at:4}: schedule-free {shared[0]:4.1f} and {shared[1]:.0f}, in a group of its own "
        f"{own[0]:.1f} and {own[1]:.0f}, torch's AdamW {torchs[0]:.1f} and {torchs[1]:.0f}"
    )
    small = all(abs(first - 1) < 0.05 and abs(last - 100) < 1 for first, last in (own, torchs))
    as_before = as_before and small and abs(shared[0] - expected) < 0.2
sys.exit(not as_before)
PYTHON
