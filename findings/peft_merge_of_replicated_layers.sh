#!/usr/bin/env bash
# peft 0.21.2: merge_and_unload after layer_replication gives another model, without a word.
#
# layer_replication repeats layers of a model: the copies share their weights, and each has a LoRA of its own.
# merge_and_unload adds the update of every copy to the one weight that they share.
# Expected: the merged model computes what the model does (copies get weights of their own), or an error, as for other
# variants that cannot be merged.
# Seen:
#   largest output 0.35; after merge_and_unload outputs differ by 0.18
#   the same, with base weights that are cloned before: by 1.2e-07
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
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def replicated():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["down_proj"], layer_replication=[[0, 2], [0, 2]])
    ).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return model


ids = torch.arange(8)[None]
with torch.no_grad():
    trained = replicated()(input_ids=ids).logits
    shared = (replicated().merge_and_unload()(input_ids=ids).logits - trained).abs().max().item()
    cloned = replicated()
    for module in cloned.modules():
        if hasattr(module, "lora_A"):
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.detach().clone())
    own = (cloned.merge_and_unload()(input_ids=ids).logits - trained).abs().max().item()
print(f"largest output {trained.abs().max():.2f}; after merge_and_unload outputs differ by {shared:.2f}")
print(f"the same, with base weights that are cloned before: by {own:.1e}")
sys.exit(not (shared > 0.01 and own < 1e-5))
PYTHON
