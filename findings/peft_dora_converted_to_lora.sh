#!/usr/bin/env bash
# peft 0.21.2: convert_to_lora turns DoRA into LoRA without its magnitude, at any rank.
#
# DoRA computes m / |W + s B A| (W + s B A) with a learned length m of every row. convert_to_lora(model, rank) takes
# such a model, and its singular value decomposition is of s B A alone. Its one warning is that there is typically no
# need to convert a LoRA.
# Expected: at full rank a LoRA that computes what the DoRA model does (the difference of two weights is a matrix, and
# merge_and_unload gives it), or an error.
# Seen:
#   outputs of DoRA differ from those of the base by 0.9, and from the conversion's
#   by 0.9 at rank 4, by 0.9 at rank 16 (full); from those of merge_and_unload by 2.4e-07
#   warnings:
#     Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.24.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(16, 16)

    def forward(self, x):
        return self.q(x)


x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
dora = get_peft_model(Model(), LoraConfig(r=4, lora_alpha=4, target_modules=["q"], use_dora=True)).eval()
for p in (p for p in dora.parameters() if p.requires_grad):  # what training does: factors and magnitude move
    p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
trained = dora(x).detach()


def converted(rank):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config, state = convert_to_lora(dora, rank=rank)
    lora = get_peft_model(Model(), config).eval()
    set_peft_model_state_dict(lora, state)
    return (lora(x) - trained).abs().max().item(), [str(w.message) for w in seen]


moved = (Model()(x) - trained).abs().max().item()
(low, _), (full, messages) = converted(4), converted(16)
merged = (dora.merge_and_unload()(x) - trained).abs().max().item()
print(f"outputs of DoRA differ from those of the base by {moved:.1f}, and from the conversion's")
print(f"by {low:.1f} at rank 4, by {full:.1f} at rank 16 (full); from those of merge_and_unload by {merged:.1e}")
print("warnings:", *(message.splitlines()[0] for message in messages), sep="\n  ")
silent = not any(word in message.lower() for message in messages for word in ("dora", "magnitude"))
sys.exit(not (full > 0.1 and low > 0.1 and merged < 1e-5 and silent))
PYTHON
