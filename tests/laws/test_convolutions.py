"""Laws of the forms of convolutions, over all ordered pairs and geometries."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from convolutions import CHANNELS, FORMS, GEOMETRIES, OUT, PAIRS, dense, fits, inputs, trained
from forms import ids
from torch import nn

from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    LayerShape,
    convert,
    effective_weight,
    empty_like,
    flops_of,
    form_from_dict,
    form_to_dict,
    layout_of,
    parameters_of,
    prepare,
    tensor_shapes,
    trainable_weights,
    weight_shape,
)

pairs = pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)
forms = pytest.mark.parametrize("form", FORMS, ids=ids)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def whole(geometry, decomposition):
    """Factors of full rank."""
    out, into = weight_shape(dense(geometry))
    if decomposition == "svd":
        return Factored(min(out, into))
    if decomposition == "tucker":
        return Factored(out, "tucker", CHANNELS)
    sizes = dense(geometry).weight.shape
    return Factored(sizes.numel() // max(sizes), "cp")


@geometries
@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp"])
def test_at_full_rank_the_function_is_preserved(geometry, decomposition):
    layer, x = dense(geometry), inputs(geometry)
    y = layer(x)
    conversion = convert(layer, whole(geometry, decomposition))
    assert conversion.error <= 1e-5
    assert (conversion.module(x) - y).abs().max() <= 1e-5
    back = convert(conversion.module, Dense()).module
    assert type(back) is type(layer)
    assert (back(x) - y).abs().max() <= 1e-5


@geometries
@forms
def test_every_form_computes_the_dense_convolution_with_its_effective_kernel(geometry, form):
    """Outputs, and gradients of the input and of every factor, against autograd of the dense one."""
    layer, x = trained(geometry, form), inputs(geometry).requires_grad_()
    reference = dense(geometry)
    y = layer(x)
    weights = list(trainable_weights(layer))
    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
    kernel = layer.weight * 1  # differentiable in the factors
    assert kernel.shape == reference.weight.shape
    expected = torch.func.functional_call(reference, {"weight": kernel}, (x,))
    assert (y - expected).abs().max() <= 1e-5
    for gradient, other in zip(gradients, torch.autograd.grad(expected.square().sum(), [x, *weights]), strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    assert (layer.eval()(x) - y).abs().max() <= 1e-5


@pytest.mark.parametrize("geometry", ["strided", "1d", "1x1 strided"])
@pairs
def test_the_error_is_what_is_lost(geometry, before, after):
    if not (fits(geometry, before) and fits(geometry, after)):
        return
    layer = trained(geometry, before)
    W = effective_weight(layer).clone()
    y = layer(inputs(geometry))
    conversion = convert(layer, after)
    measured = ((effective_weight(conversion.module) - W).norm() / W.norm()).item()
    assert conversion.error == pytest.approx(measured, abs=1e-5)
    if isinstance(after, Factored) and after.decomposition == "svd":
        tail = torch.linalg.svdvals(W.double())[after.rank :].square().sum().sqrt() / W.norm()
        assert measured == pytest.approx(tail.item(), abs=1e-5)
    if not isinstance(after, Factored) or after == before:
        assert (conversion.module(inputs(geometry)) - y).abs().max() <= 1e-5


@pairs
def test_parameter_objects_survive_and_nothing_changes_before_the_commit(before, after):
    layer = trained("3x3", before)
    bias, kept = layer.bias, copy.deepcopy(layer)
    conversion = prepare(layer, after)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), kept.parameters(), strict=True))
    assert conversion.commit().bias is bias
    if before == Dense() and isinstance(after, Adapter):
        assert conversion.module.base is layer.weight
        assert not layer.weight.requires_grad
        assert convert(conversion.module, Dense()).module.weight is layer.weight
        assert layer.weight.requires_grad


@pairs
def test_every_factor_gets_a_gradient_in_its_first_two_steps(before, after):
    layer, x = convert(trained("3x3", before), after).module, inputs("3x3")
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    seen = [torch.zeros_like(p) for p in trainable_weights(layer)]
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        for total, p in zip(seen, trainable_weights(layer), strict=True):
            total += p.grad.abs()
        optimizer.step()
    assert all((total.flatten(1).sum(1) > 0).all() for total in seen)


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp"])
def test_a_kernel_of_zeros_can_learn(decomposition):
    layer = dense("3x3")
    nn.init.zeros_(layer.weight)
    module = convert(layer, Factored(3, decomposition, 2 if decomposition == "tucker" else None)).module
    module(inputs("3x3")).sum().backward()
    assert any(p.grad.abs().max() > 0 for p in trainable_weights(module))


@geometries
@forms
def test_state_and_shapes_round_trip(geometry, form):
    if not fits(geometry, form):
        return
    layer, x = trained(geometry, form), inputs(geometry)
    stored = {name: tuple(p.shape) for name, p in layer.named_parameters() if name != "bias"}
    assert tensor_shapes(form, weight_shape(layer), layout_of(layer)) == stored
    assert parameters_of(form, weight_shape(layer)) == sum(p.numel() for p in trainable_weights(layer))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = empty_like(dense(geometry), form)
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert form_from_dict(form_to_dict(form)) == form


@pairs
def test_weights_of_one_form_never_load_into_another_in_silence(before, after):
    source, target = trained("3x3", before), trained("3x3", after)
    if before == after or {k: v.shape for k, v in source.state_dict().items()} == {
        k: v.shape for k, v in target.state_dict().items()
    }:
        return
    message = r"size mismatch|is a dense weight of shape|in another in the checkpoint, which holds"
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(source.state_dict(), strict=False)


@pytest.mark.parametrize("stride", [1, 2])
@forms
def test_multiply_adds_are_those_of_the_convolutions(form, stride):
    """Counted by torch on a forward pass, where a third of the trained part's and half of the frozen part's happen."""
    from torch.utils.flop_counter import FlopCounterMode

    dense_layer = nn.Conv2d(CHANNELS, OUT, 3, stride=stride, padding=1, bias=False)
    layer = convert(dense_layer, form).module
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(1, CHANNELS, 8, 8))
    positions = y.numel() // OUT
    shape = weight_shape(layer)
    total = flops_of(form, shape)
    expected = total / 3 if not isinstance(form, Adapter) else (total - 2 * OUT * shape[1]) / 3 + OUT * shape[1]
    assert counter.get_total_flops() == pytest.approx(2 * positions * expected)


def test_forms_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'tucker' is of convolutions only"):
        convert(nn.Linear(4, 4), Factored(2, "tucker", 2))
    with pytest.raises(ValueError, match=r"only convolutions with groups=1"):
        convert(nn.Conv2d(4, 4, 3, groups=2), Factored(2))
    with pytest.raises(ValueError, match=r"rank_in must lie in 1\.\.6"):
        convert(dense("3x3"), Factored(2, "tucker", 7))
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.54"):
        convert(dense("3x3"), Factored(55, "cp"))
    with pytest.raises(ValueError, match="rank_in must be a whole number"):
        Factored(2, "tucker")
    with pytest.raises(ValueError, match="rank_in is of 'tucker' only"):
        Adapter(2, rank_in=3)
    with pytest.raises(ValueError, match="decomposition must be one of svd, tucker, cp"):
        Factored(2, "qr")


def test_a_shape_survives_copies_and_unpacks():
    shape = weight_shape(dense("strided"))
    assert shape == (OUT, CHANNELS * 9)
    other = copy.deepcopy(shape)
    assert isinstance(other, LayerShape)
    assert (other.channels, other.kernel, other.stride) == (CHANNELS, (3, 3), (2, 3))


def test_dilation_enters_where_the_kernel_is():
    """By hand: V as a dilated convolution, U after it."""
    layer = trained("dilated, same", Factored(6))
    x = inputs("dilated, same")
    low = F.conv2d(x, layer.V.reshape(6, CHANNELS, 3, 3), None, padding="same", dilation=(2, 1))
    assert torch.allclose(layer(x), F.conv2d(low, layer.U[:, :, None, None], layer.bias), atol=1e-6)
