"""An adapter's frozen base in bfloat16 and int8: what it holds, computes and costs, against plain mathematics."""

import copy
import importlib.util
import io

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    convert,
    effective_weight,
    empty_like,
    form_from_dict,
    form_of,
    form_to_dict,
    frozen_by_user,
    own_behaviour,
    tensor_shapes,
    trainable_weights,
)

OUT, IN = 24, 40
DTYPES = ["bfloat16", "int8"]
LAYOUTS = ["linear", "linear_without_bias", "conv1d"]
INITS = ["zero", "principal", "split"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))


def dense(layout: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if layout == "conv1d" else nn.Linear(IN, OUT, bias=layout == "linear")
    nn.init.normal_(layer.weight, std=0.2)
    return layer


def matrix(weight: torch.Tensor, layout: str) -> torch.Tensor:
    return weight.detach().T if layout == "conv1d" else weight.detach()


def adapter(dtype: str | None, layout: str = "linear", rank: int = 4, init: str = "zero") -> nn.Module:
    """With both factors away from zero."""
    layer = convert(dense(layout), Adapter(rank, 2.0 * rank, init, dtype=dtype)).module
    torch.manual_seed(1)
    for factor in trainable_weights(layer):
        factor.data += 0.05 * torch.randn_like(factor)
    return layer


def rounded(W: torch.Tensor, dtype: str) -> torch.Tensor:
    """By torch's cast, and by torchao's own way of quantizing a whole model."""
    if dtype == "bfloat16":
        return W.bfloat16().double()
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data.copy_(W)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0].weight.dequantize().double()


def product(layer: nn.Module) -> torch.Tensor:
    """The adapter's part of W in float64."""
    return layer.form.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@layouts
@dtypes
def test_the_base_is_w_rounded_once_and_what_that_cost_is_told(layout, dtype):
    before = matrix(dense(layout).weight, layout)
    conversion = convert(dense(layout), Adapter(4, 8.0, dtype=dtype))
    kept = effective_weight(conversion.module)
    assert torch.equal(kept.double(), rounded(before, dtype))
    assert conversion.rounding_error == pytest.approx(relative(kept, before), rel=1e-4)
    assert 0 < conversion.rounding_error < {"bfloat16": 2**-8, "int8": 0.01}[dtype]
    steps = before.abs() * 2**-7 if dtype == "bfloat16" else before.abs().amax(1, keepdim=True) / 127.5
    assert ((kept - before).abs() <= steps / 2 * (1 + 1e-3)).all()
    assert conversion.merge_error == 0.0  # nothing has been learned yet


@pytest.mark.parametrize("init", ["principal", "split"])
@dtypes
def test_what_principal_directions_leave_is_rounded_and_the_directions_are_not(init, dtype):
    W = dense().weight.detach()
    layer = convert(dense(), Adapter(4, 8.0, init, dtype=dtype)).module
    U, S, Vh = torch.linalg.svd(W.double())
    top = U[:, :4] * S[:4] @ Vh[:4]
    assert relative(product(layer), top) < 1e-5
    error = effective_weight(layer).double() - W.double()
    assert error.norm() <= {"bfloat16": 2**-8, "int8": 0.01}[dtype] * (W.double() - top).norm()


@layouts
@dtypes
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_rounded_base_in_float64(layout, dtype, training):
    layer = adapter(dtype, layout).train(training)
    base = rounded(matrix(dense(layout).weight, layout), dtype)
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    for shape in ((IN,), (5, IN), (2, 3, IN), (0, IN)):
        x = torch.randn(shape, requires_grad=True)
        z = x.detach().double().requires_grad_()
        expected = nn.functional.linear(z, base + layer.form.scaling * B @ A, bias)
        layer.zero_grad()
        A.grad = B.grad = None
        y = layer(x)
        assert torch.allclose(y.double(), expected, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
        for mine, theirs in ((x, z), (layer.lora_A, A), (layer.lora_B, B)):
            assert torch.allclose(mine.grad.double(), theirs.grad, atol=1e-4)
        if bias is not None:
            assert torch.allclose(layer.bias.grad.double(), bias.grad, atol=1e-4)
            bias.grad = None
    assert torch.allclose(matrix(layer.weight + 0, layout), (base + product(layer)).float(), atol=1e-6)
    assert all(layer.get_parameter(n).grad is None for n in set(layer.tensors) - set(layer.path))


@dtypes
def test_bytes_are_those_of_the_type_and_autograd_keeps_no_wider_copy(dtype):
    layer = adapter(dtype)
    frozen = OUT * IN * {"bfloat16": 2, "int8": 1}[dtype] + (4 * OUT if dtype == "int8" else 0)
    assert sum(p.nbytes for p in layer.parameters() if not p.requires_grad) == frozen
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(X.clone().requires_grad_())
    by_storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    factors = sum(p.nbytes for p in (layer.lora_A, layer.lora_B))
    assert sum(by_storage.values()) == frozen + factors + X.nbytes + 4 * 5 * layer.form.rank  # x, and A x


@dtypes
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype, autocast):
    layer, plain = adapter(dtype), adapter(None)
    plain.base.data = rounded(dense().weight.detach(), dtype).float()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        found, expected = layer(x), plain(y)
    assert found.dtype == autocast
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    # torch casts a leaf once for both products, and sums their gradients before it casts them back
    assert torch.equal(x.grad, y.grad) if dtype == "bfloat16" else relative(x.grad, y.grad) < 2**-7
    assert all(torch.equal(layer.get_parameter(n).grad, plain.get_parameter(n).grad) for n in ("lora_A", "bias"))


@dtypes
def test_the_compiled_layer_computes_the_same(dtype):
    layer = adapter(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert torch.allclose(compiled(x), layer(y), atol=1e-6)
    compiled(x).sum().backward()
    layer(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


@layouts
@dtypes
def test_back_to_dense_w_is_merged_in_float32_and_nothing_more_is_lost(layout, dtype):
    layer = adapter(dtype, layout)
    expected = rounded(matrix(dense(layout).weight, layout), dtype) + product(layer)
    conversion = convert(layer, Dense())
    found = conversion.module
    assert found.weight.dtype == torch.float32
    assert found.weight.requires_grad
    assert torch.allclose(matrix(found.weight, layout).double(), expected, atol=1e-6)
    assert (conversion.merge_error, conversion.rounding_error) == (0.0, 0.0)
    assert relative(effective_weight(convert(adapter(dtype, layout), Factored(OUT)).module), expected) < 1e-5


@dtypes
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_switch_between_adapters_rounds_the_new_base_once_and_says_what_that_took(dtype, init, rank):
    layer = adapter(dtype, init=init)
    before, old = effective_weight(layer).double(), effective_weight(layer).double() - product(layer)
    conversion = convert(layer, Adapter(rank, 2.0 * rank, init, dtype=dtype))
    after = effective_weight(conversion.module).double()
    wanted = before - product(conversion.module)  # of the base, had it all its digits
    error = (after - before).norm()
    assert error <= {"bfloat16": 2**-8, "int8": 0.01}[dtype] * wanted.norm()
    assert conversion.rounding_error == pytest.approx((error / wanted.norm()).item(), rel=1e-2)
    assert conversion.merge_error == pytest.approx((error / (wanted - old).norm()).item(), rel=1e-2)


def test_a_base_that_has_no_digits_for_it_loses_an_update_and_says_so():
    layer = convert(dense(), Adapter(4, 8.0, dtype="bfloat16")).module
    nn.init.normal_(layer.lora_B, std=1e-5)
    before = layer.base.detach().clone()
    conversion = convert(layer, Adapter(4, 8.0, dtype="bfloat16"))
    assert conversion.merge_error == pytest.approx(1.0, abs=0.05)
    assert relative(conversion.module.base, before) < 1e-4


@dtypes
def test_between_types_and_from_a_frozen_layer_every_way_is_there(dtype):
    for first in (Adapter(4, 8.0), Dense(frozen=True, dtype="bfloat16"), Adapter(4, 8.0, dtype="int8"), Factored(4)):
        layer = convert(dense(), first).module
        expected = rounded(effective_weight(layer), dtype)
        layer = convert(layer, Adapter(3, 6.0, dtype=dtype)).module
        assert relative(effective_weight(layer), expected) < 1e-6
        assert {p.dtype for p in trainable_weights(layer)} == {torch.float32}
        assert not frozen_by_user(layer)


@layouts
@dtypes
def test_a_layer_is_copied_pickled_saved_and_loaded(layout, dtype):
    layer = adapter(dtype, layout)
    assert own_behaviour(layer) is None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    empty = empty_like(dense(layout), layer.form)
    empty.load_state_dict(layer.state_dict())
    if empty.bias is not None:
        empty.bias.data.copy_(layer.bias)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), empty):
        assert form_of(other) == layer.form
        assert torch.equal(other(X), layer(X))
        assert [(n, p.dtype, p.requires_grad) for n, p in other.named_parameters()] == [
            (n, p.dtype, p.requires_grad) for n, p in layer.named_parameters()
        ]
    shapes = {n: tuple(layer.get_parameter(n).shape) for n in layer.tensors}
    assert tensor_shapes(layer.form, (OUT, IN), layer.layout) == shapes
    assert form_from_dict(form_to_dict(layer.form)) == layer.form


def test_codes_are_not_loaded_as_weights_nor_weights_as_codes():
    codes, floats = adapter("int8"), adapter("bfloat16")
    with pytest.raises(
        RuntimeError, match=r"base is in torch\.bfloat16 in the checkpoint, and in torch\.int8 here, in "
    ):
        codes.load_state_dict(floats.state_dict(), strict=False)
    for other in (floats, adapter(None)):
        with pytest.raises(
            RuntimeError, match=r"base is in torch\.int8 in the checkpoint, and in torch\.\w+ here, in f"
        ):
            other.load_state_dict(codes.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"in another in the checkpoint, which holds base_scale"):
        floats.load_state_dict(codes.state_dict(), strict=False)


def test_in_another_dtype_the_layer_follows_whole():
    for cast, dtype in ((nn.Module.double, torch.float64), (nn.Module.half, torch.float16)):
        for kept in DTYPES:
            layer = cast(adapter(kept))
            assert layer(X.to(dtype)).dtype == layer.weight.dtype == dtype
            assert convert(layer, Dense()).module.weight.dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", 8])
def test_a_type_that_there_is_not_is_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype is that of the base, and 'bfloat16', 'int8' or None; got "):
        Adapter(4, dtype=dtype)


@dtypes
def test_a_base_of_a_convolution_is_refused(dtype):
    message = rf"dtype='{dtype}'\) is a form of linear layers, and of no convolution or experts\. Use Adapter\(rank=2, "
    with pytest.raises(ValueError, match=message):
        convert(nn.Conv2d(4, 4, 3), Adapter(2, dtype=dtype))


def test_int8_without_torchao_is_refused_and_its_layers_compute_all_the_same(monkeypatch):
    layer, find = adapter("int8"), importlib.util.find_spec
    monkeypatch.setattr("hf_drt.forms.kept.find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(
        ValueError, match=r"quantized by torchao, which is not installed\. pip install 'hf-drt\[int8\]'"
    ):
        convert(dense(), Adapter(4, 8.0, dtype="int8"))
    y = layer(X)
    assert torch.allclose(convert(layer, Dense()).module(X), y, atol=1e-6)
