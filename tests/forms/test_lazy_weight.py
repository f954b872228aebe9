"""The weight of a low-rank layer: right wherever it is used, free where only its metadata are read."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_drt import Adapter, DRTConfig, DynamicRank, Factored, convert
from hf_drt.forms import LowRankLinear

X = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[Factored(3), Adapter(3)], ids=["factored", "adapter"])
def layer(request):
    torch.manual_seed(0)
    return convert(nn.Linear(12, 8), request.param).module


def count_products(monkeypatch):
    calls = []
    for cls in LowRankLinear.__subclasses__():
        formed = cls.matrix
        monkeypatch.setattr(cls, "matrix", lambda self, formed=formed: calls.append(self) or formed(self))
    return calls


def test_metadata_are_those_of_w_and_form_no_product(layer, monkeypatch):
    calls = count_products(monkeypatch)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (torch.float32, layer.bias.device, (8, 12), 2)
    assert weight.size(0) == 8
    assert weight.dim() == 2
    assert weight.numel() == 96
    assert weight.is_floating_point()
    assert not calls


def test_t5_trains_without_ever_forming_w(monkeypatch):
    calls = count_products(monkeypatch)
    model = tiny.t5()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 adapter@1", rank=4), 2)
    for step in range(2):
        drt.apply(step)
        calls.clear()
        model(**tiny.batch("t5")).loss.backward()
        assert not calls


def test_any_computation_uses_w_and_reaches_the_factors_with_gradients(layer):
    reference = copy.deepcopy(layer)
    y = F.linear(X, layer.weight, layer.bias)
    assert torch.allclose(y, layer(X), atol=1e-6)
    y.square().sum().backward()
    reference(X).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, atol=1e-4), name


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: torch.cat([w, w]),
        lambda w: w.t() @ w,
        lambda w: w + 1,
        lambda w: w.to(torch.float64),
        lambda w: w.detach().clone(),
        lambda w: torch.stack((w, w.abs())),
        lambda w: w[0],
        lambda w: w.sum(),
    ],
)
def test_operations_give_plain_tensors(layer, compute):
    plain = layer._formed_weight().detach()
    assert torch.allclose(compute(layer.weight), compute(plain))
    assert type(compute(layer.weight)) is torch.Tensor


def test_multi_head_attention_takes_it_as_a_projection(layer):
    """What wavlm does: the weight goes into F.multi_head_attention_forward."""
    square = convert(nn.Linear(12, 12), Factored(3)).module

    def attention(weight):
        return F.multi_head_attention_forward(
            X, X, X, 12, 2, None, torch.zeros(36), None, None, False, 0.0, weight, square.bias,
            use_separate_proj_weight=True, q_proj_weight=weight, k_proj_weight=weight, v_proj_weight=weight,
        )[0]  # fmt: skip

    assert torch.allclose(attention(square.weight), attention(square._formed_weight()), atol=1e-6)


def test_data_are_the_values_without_a_gradient(layer):
    data = layer.weight.data
    assert not data.requires_grad
    assert torch.equal(data + 0, layer._formed_weight().detach())


def test_printing_shows_the_values(layer):
    assert repr(layer.weight).startswith("EffectiveWeight(tensor(")


class Product(torch.autograd.Function):
    """x W^T in a custom function, which tensor subclasses reach without __torch_function__."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        return gradient @ weight, gradient.flatten(0, 1).t() @ x.flatten(0, 1)


def test_gradients_pass_through_a_custom_autograd_function(layer):
    reference = copy.deepcopy(layer)
    (Product.apply(X, layer.weight) + layer.bias).square().sum().backward()
    reference(X).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, atol=1e-4), name


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.zero_(),
        lambda w: w.data.zero_(),
        lambda w: w.data.copy_(torch.ones(8, 12)),
        lambda w: w.detach_(),
        lambda w: w.requires_grad_(False),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: setattr(w, "data", torch.ones(8, 12)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(torch.ones(8, 12), 1, out=w),
    ],
)
def test_writing_to_it_is_an_error_that_names_the_parameters(layer, write):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"would write to the weight of a low-rank layer"):
        write(layer.weight)


def test_reading_it_under_no_grad_needs_no_gradient(layer):
    with torch.no_grad():
        assert not layer.weight.requires_grad
    assert layer.weight.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
