"""In which precision, and by which means, a layer computes: float32, halves, autocast, recomputation, the compiler."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_drt.doctor.check import told
from hf_drt.doctor.layers import KINDS, Case, Kind, moved
from hf_drt.forms import keep_bottlenecks


@dataclass(frozen=True)
class Mode:
    """A way to compute.

    Attributes:
        dtype: Of weights and inputs.
        autocast: Of products, where they are of another one.
        recomputes: Whether the forward pass is repeated in the backward pass, but for the products with V.
        coarse: Largest relative error of dense layers that counts as theirs: of a rounding of inputs to the bits that
            the mode has. TF32, which convolutions have by default on NVIDIA's devices, keeps 10 bits.
    """

    name: str
    dtype: torch.dtype
    coarse: float
    autocast: torch.dtype | None = None
    recomputes: bool = False

    @property
    def eps(self) -> float:
        """Of the dtype in which products are computed."""
        return torch.finfo(self.autocast or self.dtype).eps


FP32 = Mode("fp32", torch.float32, 2e-3)
MODES = (
    FP32,
    Mode("bf16", torch.bfloat16, 3e-2),
    Mode("fp16", torch.float16, 4e-3),
    Mode("autocast bf16", torch.float32, 3e-2, torch.bfloat16),
    Mode("autocast fp16", torch.float32, 4e-3, torch.float16),
    Mode("recompute", torch.float32, 2e-3, None, True),
)
COMPILED = Mode("compile", torch.float32, 2e-3)

Computed = dict[str, Tensor]


def unusable(mode: Mode, device: torch.device) -> str | None:
    """Why dense layers cannot be computed so on this device, or None."""
    try:
        for kind in KINDS:
            compute(mode, kind, moved(kind.layer(), device, mode.dtype), *batch(kind))
    except Exception as error:  # what a device says that cannot do it has no class of its own
        return f"dense layers cannot be computed so on {device} ({told(error)})"
    return None


def batch(kind: Kind) -> tuple[Tensor, Tensor]:
    """An input of a kind of layer, and the gradient of the output; in float32 on the CPU, always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(kind.inputs, generator=generator)
    with torch.no_grad():
        shape = kind.apply(kind.layer(), x).shape
    return x, torch.randn(shape, generator=generator)


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What has a gradient, by name."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def compute(mode: Mode, kind: Kind, layer: nn.Module, x: Tensor, gradient: Tensor) -> Computed:
    """The output of a layer that is on the device in the mode's dtype, and the gradients of its input and weights."""
    device = next(layer.parameters()).device
    x = x.to(device, mode.dtype).requires_grad_()
    with _autocast(mode, device):
        apply = partial(kind.apply, layer)
        y = keep_bottlenecks(apply, x) if mode.recomputes else apply(x)
    weights = trained(layer)
    found = torch.autograd.grad(y, [x, *weights.values()], gradient.to(y))
    return named(y, found, weights)


def named(y: Tensor, gradients: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Computed:
    """What was computed, by what it is."""
    names = ("the input", *weights)
    by_name = {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}
    return {"output": y.detach()} | by_name


@contextlib.contextmanager
def _autocast(mode: Mode, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, mode.autocast) if mode.autocast is not None else contextlib.nullcontext():
        yield


class _All(nn.Module):
    """Layers side by side, so that the compiler is called once."""

    def __init__(self, kinds: list[Kind], layers: list[nn.Module]):
        super().__init__()
        self.kinds, self.layers = kinds, nn.ModuleList(layers)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        parts = zip(self.kinds, self.layers, inputs, strict=True)
        return [kind.apply(layer, x) for kind, layer, x in parts]


def compute_compiled(layers: Mapping[Case, nn.Module], device: torch.device) -> dict[Case, Computed]:
    """As :func:`compute` in float32, all of them compiled as one graph, without a part that runs uncompiled."""
    batches = {case: batch(case.kind) for case in layers}
    inputs = [x.to(device).requires_grad_() for x, _ in batches.values()]
    module = _All([case.kind for case in layers], list(layers.values()))
    outputs = torch.compile(module, dynamic=False, fullgraph=True)(inputs)
    weights = [trained(layer) for layer in layers.values()]
    wanted = [tensor for x, own in zip(inputs, weights, strict=True) for tensor in (x, *own.values())]
    gradients = iter(torch.autograd.grad(outputs, wanted, [g.to(device) for _, g in batches.values()]))
    return {
        case: named(y, [next(gradients) for _ in range(1 + len(own))], own)
        for case, y, own in zip(layers, outputs, weights, strict=True)
    }


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device, or None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a C++ compiler or Triton is missing, or this Python is too new
        return f"torch.compile does not work for {device} ({told(error)})"
    return None
