#!/usr/bin/env bash
# openvino 2026.4.1: attention of a row whose mask is all False is nan on the CPU, where torch gives zeros.
#
# Rows that are padded on the left have such queries: under a causal mask the first tokens see padding alone. The next
# block multiplies their nan by weights of zero, so that every token of the row is nan; in torch the row is as without
# padding.
# Expected: the attention of torch, 0 for a fully masked query.
# Seen:
#   torch:    fully masked [0.0, 0.0], others finite True
#   openvino: fully masked [nan, nan], others equal to torch's True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import openvino as ov
import torch
from torch import nn


class Attention(nn.Module):
    def forward(self, x, mask):
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


torch.manual_seed(0)
x, mask = torch.randn(1, 1, 3, 2), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
model = ov.convert_model(Attention().eval(), example_input=(x, mask))
compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
mask[..., 0] = False  # the first token is padding, so that it sees nothing
expected = Attention()(x, mask)[0, 0]
seen = torch.from_numpy(compiled([x.numpy(), mask.numpy()])[0])[0, 0]
same = torch.allclose(seen[1:], expected[1:], atol=1e-5)
print(f"torch:    fully masked {expected[0].tolist()}, others finite {bool(expected[1:].isfinite().all())}")
print(f"openvino: fully masked {seen[0].tolist()}, others equal to torch's {same}")
sys.exit(not (expected[0].eq(0).all() and seen[0].isnan().all() and same))
PYTHON
