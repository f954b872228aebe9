"""Forward and backward of the low-rank layers against autograd through the plain expression of W, in every setting."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_drt.forms import Adapter, AdapterLinear, Factored, LowRankLinear, convert

IN, OUT = 10, 14
forms = pytest.mark.parametrize("form", [Factored(4), Adapter(4, 8.0), Adapter(3, 5.0, "principal")], ids=str)
shapes = pytest.mark.parametrize("shape", [(IN,), (6, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)], ids=str)


def made(form, dense: type = nn.Linear, bias: bool = True, dtype: torch.dtype = torch.float64) -> LowRankLinear:
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if dense is Conv1D else nn.Linear(IN, OUT, bias=bias)
    layer = convert(layer.to(dtype), form).module
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def plain(layer: LowRankLinear, x: Tensor) -> Tensor:
    """The definition: x W^T + b, with W written out."""
    if isinstance(layer, AdapterLinear):
        base = layer.base.mT if layer.layout.transposed else layer.base
        W = base + layer.form.alpha / layer.form.rank * layer.lora_B @ layer.lora_A
    else:
        W = layer.U @ layer.V
    y = torch.einsum("...i,oi->...o", x, W)
    return y if layer.bias is None else y + layer.bias


def gradients(work, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of all trainable parameters, for a loss that is not linear."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(work(x).sin().sum(), wanted))


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).requires_grad_()
    )


@forms
@shapes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dense", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_values_and_gradients_are_those_of_the_definition(form, shape, dense, bias, training):
    layer, x = made(form, dense, bias).train(training), inputs(*shape)
    torch.testing.assert_close(layer(x), plain(layer, x))
    for mine, theirs in zip(gradients(layer, layer, x), gradients(lambda x: plain(layer, x), layer, x), strict=True):
        torch.testing.assert_close(mine, theirs)


@forms
def test_second_derivatives_are_right(form):
    layer, x = made(form), inputs(2, IN)
    assert torch.autograd.gradgradcheck(layer, (x,))


@forms
def test_a_frozen_base_gets_no_gradient(form):
    layer = made(form)
    layer(inputs(2, IN)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == {"base"} & set(layer.tensors)


@forms
@pytest.mark.parametrize("work", ["checkpoint", "twice", "compiled"])
def test_it_is_the_same_function_under(form, work):
    layer, x = made(form), inputs(2, 3, IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    runs = {
        "checkpoint": (lambda x: checkpoint(layer, x, use_reentrant=False), lambda x: plain(layer, x)),
        "twice": (
            lambda x: layer(layer(x)[..., :IN]) + layer(x),
            lambda x: plain(layer, plain(layer, x)[..., :IN]) + plain(layer, x),
        ),
        "compiled": (compiled, lambda x: plain(layer, x)),
    }
    mine, theirs = runs[work]
    torch.testing.assert_close(mine(x), theirs(x))
    for a, b in zip(gradients(mine, layer, x), gradients(theirs, layer, x), strict=True):
        torch.testing.assert_close(a, b)


@forms
def test_autocast_computes_in_bfloat16_and_gives_gradients_in_float32(form):
    layer, x = made(form, dtype=torch.float32), inputs(5, IN, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(layer, x), rtol=0.05, atol=0.2)
    for p in torch.autograd.grad(y.float().sum(), [p for p in layer.parameters() if p.requires_grad]):
        assert p.dtype == torch.float32
