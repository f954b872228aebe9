#!/usr/bin/env bash
# accelerate 1.15.0: after remove_hook_from_module a shallow copy of a module computes with the original.
#
# add_hook_to_module puts a forward into the instance, and remove_hook_from_module puts the old one, which is bound to
# that instance, where it was. So module.__dict__ has a forward from then on, copy.copy takes it along, and the copy's
# forward reads the original's weights and settings. copy.deepcopy binds it anew.
# Expected: the module as it was before (add_hook_to_module: "restore the original `forward` method"), with a forward
# that is found on its class.
# Seen:
#                                              never hooked   hook added and removed
#   forward in module.__dict__                 False          True
#   copy.copy, negative_slope 1 -> 5, at -1    -5.0           -1.0
#   copy.copy, weight 1 -> 5, at 1             5.0            1.0
#   copy.deepcopy, weight 1 -> 5, at 1         5.0            5.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q accelerate==1.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn


def hooked_once(module):
    add_hook_to_module(module, ModelHook())
    return remove_hook_from_module(module)


def slope(module):
    """Output of a copy with slope 5 of a LeakyReLU with slope 1, at -1."""
    other = copy.copy(module)
    other.negative_slope = 5.0
    return other(torch.tensor([-1.0])).item()


def weight(module, make_copy=copy.copy):
    """Output of a copy with weight 5 of a Linear with weight 1, at 1."""
    nn.init.ones_(module.weight)
    other = make_copy(module)
    other._parameters = {"weight": nn.Parameter(torch.full((1, 1), 5.0)), "bias": None}  # a dict of its own
    return other(torch.ones(1)).item()


def both(measure, make, **kwargs):
    return [measure(make(), **kwargs), measure(hooked_once(make()), **kwargs)]


slopes = both(slope, lambda: nn.LeakyReLU(1.0))
weights = both(weight, lambda: nn.Linear(1, 1, bias=False))
deep = both(weight, lambda: nn.Linear(1, 1, bias=False), make_copy=copy.deepcopy)
left = ["forward" in vars(m) for m in (nn.LeakyReLU(), hooked_once(nn.LeakyReLU()))]
print("                                           never hooked   hook added and removed")
for name, (before, after) in {
    "forward in module.__dict__": left,
    "copy.copy, negative_slope 1 -> 5, at -1": slopes,
    "copy.copy, weight 1 -> 5, at 1": weights,
    "copy.deepcopy, weight 1 -> 5, at 1": deep,
}.items():
    print(f"{name:42} {before!s:14} {after}")
sys.exit(not (left == [False, True] and slopes == [-5.0, -1.0] and weights == [5.0, 1.0] and deep == [5.0, 5.0]))
PYTHON
