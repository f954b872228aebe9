"""Convolutions and their forms under test: small, and odd in every way that a convolution can be."""

from itertools import product

import torch
from torch import nn

from hf_drt.forms import Adapter, AdapterLinear, Dense, Factored, Form, convert, trainable_weights

OUT, CHANNELS = 10, 6

# Name: the layer's class and geometry, and the size of its input.
GEOMETRIES = {
    "3x3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (7, 9)),
    "strided": (nn.Conv2d, {"kernel_size": 3, "stride": (2, 3), "padding": (1, 0)}, (9, 8)),
    "1x1 strided": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "bias": False}, (7, 7)),
    "1x7": (nn.Conv2d, {"kernel_size": (1, 7), "padding": (0, 3)}, (4, 9)),
    "even, same": (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}, (6, 7)),
    "dilated, same": (nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": "same"}, (8, 7)),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid", "bias": False}, (5, 6)),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2}, (8, 7)),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, (5, 6)),
    "circular, same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"}, (6, 7)),
    "1d": (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 2, "dilation": 2}, (19,)),
    "1d, reflect": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}, (9,)),
}
SAMPLES = {
    Dense: [Dense()],
    Factored: [Factored(6), Factored(3), Factored(7, "tucker", 4), Factored(5, "cp")],
    Adapter: [
        Adapter(4, 16.0), Adapter(3, 8.0, "principal"), Adapter(4, 2.0, decomposition="tucker", rank_in=3),
        Adapter(4, 64.0, decomposition="cp"), Adapter(3, 2.0, "principal", "tucker", 2),
        Adapter(3, 6.0, "principal", "cp"),
    ],
}  # fmt: skip
FORMS = [form for forms in SAMPLES.values() for form in forms]
PAIRS = list(product(FORMS, FORMS))


def dense(geometry: str) -> nn.Module:
    """A dense convolution."""
    torch.manual_seed(0)
    cls, arguments, _ = GEOMETRIES[geometry]
    return cls(CHANNELS, OUT, **arguments)


def inputs(geometry: str) -> torch.Tensor:
    """Three samples."""
    return torch.randn(3, CHANNELS, *GEOMETRIES[geometry][2], generator=torch.Generator().manual_seed(2))


def trained(geometry: str, form: Form) -> nn.Module:
    """A layer in a form, moved away from its start so that no factor is zero."""
    layer = convert(dense(geometry), form if fits(geometry, form) else Dense()).module
    torch.manual_seed(1)
    if isinstance(layer, AdapterLinear):
        nn.init.normal_(trainable_weights(layer)[-1], std=0.1)
    return layer


def fits(geometry: str, form: Form) -> bool:
    """A 1x1 kernel is a matrix of 10 x 6."""
    return form == Dense() or geometry != "1x1 strided" or form.rank <= CHANNELS
