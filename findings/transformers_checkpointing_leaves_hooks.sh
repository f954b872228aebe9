#!/usr/bin/env bash
# transformers 5.24.0: gradient_checkpointing_disable() does not undo gradient_checkpointing_enable(): a forward hook on
# the input embeddings stays, and each further enabling adds one.
#
# The hook makes the embeddings' output require a gradient. It is registered whatever use_reentrant is, and nothing
# removes it. Of a model whose weights are all frozen, a forward pass that kept nothing before keeps all its activations
# for a backward pass afterwards, though checkpointing is off again. The new names, activation_checkpointing_enable() and
# _disable(), do the same.
# Expected: after disabling, the model computes as it did before enabling.
# Seen:
#   hooks on the embeddings: 0 before; 1 enabled, 1 disabled; 2 enabled, 2 disabled
#   a frozen model's logits require a gradient: before False, enabled and disabled again True
#   tensors kept for a backward pass: before 0, afterwards more than 0: True
#   by activation_checkpointing_enable and _disable: hooks 1, logits require a gradient True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def frozen_model():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).requires_grad_(False).train()


def hooks(model):
    return len(model.get_input_embeddings()._forward_hooks)


def passed(model):
    """Whether the logits require a gradient, and how many tensors the forward pass has kept."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = model(input_ids=torch.arange(8)[None]).logits
    return logits.requires_grad, len(kept)


model = frozen_model()
before, counts = passed(model), [hooks(model)]
for _ in range(2):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counts.append(hooks(model))
    model.gradient_checkpointing_disable()
    counts.append(hooks(model))
after = passed(model)
print("hooks on the embeddings: {} before; {} enabled, {} disabled; {} enabled, {} disabled".format(*counts))
print(f"a frozen model's logits require a gradient: before {before[0]}, enabled and disabled again {after[0]}")
print(f"tensors kept for a backward pass: before {before[1]}, afterwards more than 0: {after[1] > 0}")
other = frozen_model()
other.activation_checkpointing_enable()
other.activation_checkpointing_disable()
print(
    "by activation_checkpointing_enable and _disable: "
    f"hooks {hooks(other)}, logits require a gradient {passed(other)[0]}"
)
seen = (counts, before, after[0], after[1] > 0, hooks(other), passed(other)[0])
sys.exit(seen != ([0, 1, 1, 2, 2], (False, 0), True, True, 1, True))
PYTHON
