"""Forms under test, discovered from the type union: a new form without samples here fails the suite."""

from itertools import product
from typing import get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_drt.forms import Adapter, AdapterLinear, Dense, Factored, Form, convert

OUT, IN = 24, 40

SAMPLES = {
    Dense: [Dense(), Dense(frozen=True)],
    Factored: [Factored(12), Factored(4)],
    Adapter: [Adapter(4, 16.0, "zero"), Adapter(6, 8.0, "principal")],
}
FORMS = [form for cls in get_args(Form) for form in SAMPLES[cls]]
PAIRS = list(product(FORMS, FORMS))
LAYOUTS = ["linear", "linear_without_bias", "conv1d"]


def dense(layout: str) -> nn.Module:
    """A dense layer (24, 40) with weights of ordinary size."""
    torch.manual_seed(0)
    if layout == "conv1d":
        layer = Conv1D(OUT, IN)
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(IN, OUT, bias=layout == "linear")


def trained(layout: str, form: Form) -> nn.Module:
    """A layer in a form, moved away from its start so that no factor is zero."""
    layer = convert(dense(layout), form).module
    torch.manual_seed(1)
    if isinstance(layer, AdapterLinear):
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def ids(value) -> str:
    return str(value).replace(" ", "")
