"""Laws of the forms, over all ordered pairs."""

import copy
import io

import pytest
import torch
from forms import FORMS, IN, LAYOUTS, OUT, PAIRS, ids, trained
from torch import nn

from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    Layout,
    convert,
    effective_weight,
    empty_like,
    form_from_dict,
    form_to_dict,
    prepare,
    tensor_shapes,
    trainable_weights,
    weight_shape,
)

pairs = pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)
forms = pytest.mark.parametrize("form", FORMS, ids=ids)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))


@layouts
@pairs
def test_the_error_is_the_tail_of_the_singular_values(layout, before, after):
    layer = trained(layout, before)
    W = effective_weight(layer).clone()
    tail = torch.linalg.svdvals(W.double())[after.rank :] if isinstance(after, Factored) else torch.zeros(1)
    conversion = convert(layer, after)
    expected = (tail.square().sum().sqrt() / W.double().norm()).item()
    measured = ((effective_weight(conversion.module) - W).norm() / W.norm()).item()
    assert conversion.error == pytest.approx(expected, abs=1e-6)
    assert measured == pytest.approx(expected, abs=1e-5)


@layouts
@pairs
def test_the_function_is_preserved_where_nothing_is_truncated(layout, before, after):
    layer = trained(layout, before)
    y = layer(X)
    conversion = convert(layer, after)
    if conversion.error < 1e-6:
        assert (conversion.module(X) - y).abs().max() <= 1e-5


@pairs
def test_the_same_object_is_kept_as_bias(before, after):
    layer = trained("linear", before)
    bias = layer.bias
    assert convert(layer, after).module.bias is bias


@pytest.mark.parametrize("init", ["zero", "principal"])
def test_w_keeps_its_object_from_dense_to_adapter_and_back(init):
    layer = trained("linear", Dense())
    W = layer.weight
    adapter = convert(layer, Adapter(4, 16.0, init)).module
    assert adapter.base is W
    assert not W.requires_grad
    assert convert(adapter, Dense()).module.weight is W
    assert W.requires_grad


@layouts
@pairs
def test_a_conversion_changes_nothing_before_its_commit(layout, before, after):
    layer = trained(layout, before)
    kept = copy.deepcopy(layer)
    prepare(layer, after)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), kept.parameters(), strict=True))
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in kept.parameters()]


@pairs
def test_the_global_generator_is_untouched(before, after):
    layer = trained("linear", before)
    state = torch.get_rng_state()
    convert(layer, after, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


@pairs
def test_the_own_generator_decides_new_directions(before, after):
    def weights(seed):
        module = convert(trained("linear", before), after, torch.Generator().manual_seed(seed)).module
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(3), weights(3))


def test_names_are_disjoint_across_forms():
    names = {}
    for form in FORMS:
        own = {name for name, _ in trained("linear", form).named_parameters()} - {"bias"}
        names.setdefault(type(form), set()).update(own)
    for a in names:
        for b in names:
            assert a is b or not names[a] & names[b]


@layouts
@pairs
def test_every_trainable_weight_gets_a_gradient_in_its_first_two_steps(layout, before, after):
    """A zero factor next to a zero factor would never learn. LoRA's A waits one step for B. A frozen W gets none."""
    layer = convert(trained(layout, before), after).module
    if after == Dense(frozen=True):
        layer(X.clone().requires_grad_()).square().sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None] == ["weight"]
        return
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    seen = [torch.zeros_like(p) for p in trainable_weights(layer)]
    for step in range(2):
        optimizer.zero_grad()
        (layer(X) - 1).square().sum().backward()
        for total, p in zip(seen, trainable_weights(layer), strict=True):
            total += p.grad.abs()
        if step == 0:
            assert any(p.grad.abs().max() > 0 for p in trainable_weights(layer))
        optimizer.step()
    rank_axis = [total.sum(1 if total.shape[0] == getattr(after, "rank", None) else 0) for total in seen]
    assert all((direction > 0).all() for direction in rank_axis)


def test_factors_of_a_rank_deficient_weight_have_no_dead_direction():
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, 3) @ torch.randn(3, IN))
    W = effective_weight(layer).clone()
    factored = convert(layer, Factored(8)).module
    assert torch.allclose(effective_weight(factored), W, atol=1e-5)
    assert (factored.V.norm(dim=1) > 0).all()


@layouts
@forms
def test_weight_is_the_effective_matrix_in_the_dense_layout(layout, form):
    layer = trained(layout, form)
    W = effective_weight(layer)
    assert torch.allclose(layer.weight, W.mT if layout == "conv1d" else W, atol=1e-6)
    assert weight_shape(layer) == (OUT, IN)
    bias = 0 if layer.bias is None else layer.bias
    assert torch.allclose(layer(X), X @ W.mT + bias, atol=1e-5)


@layouts
@forms
def test_attributes_of_the_dense_layer_survive_the_way_back(layout, form):
    layer = trained(layout, Dense())
    layer.marker = "mine"
    cls = type(layer)
    if layout != "conv1d":
        assert (layer.in_features, layer.out_features) == (IN, OUT)
    back = convert(convert(layer, form).module, Dense()).module
    assert type(back) is cls
    assert back.marker == "mine"
    assert list(dict(back.named_parameters())) == [
        name for name in ("weight", "bias") if getattr(back, name) is not None
    ]


@layouts
@forms
def test_state_dict_round_trip_into_an_empty_layer(layout, form):
    layer = trained(layout, form)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for start in FORMS:
        empty = empty_like(trained(layout, start), form)
        empty.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        assert torch.equal(empty(X), layer(X))
        flags = {n: p.requires_grad for n, p in layer.named_parameters()}
        assert {n: p.requires_grad for n, p in empty.named_parameters()} == flags


@layouts
@forms
def test_tensor_shapes_are_those_of_the_module(layout, form):
    stored = {n: tuple(p.shape) for n, p in trained(layout, form).named_parameters() if n != "bias"}
    assert tensor_shapes(form, (OUT, IN), Layout(layout == "conv1d")) == stored


@layouts
@pairs
def test_weights_of_one_form_never_load_into_another_in_silence(layout, before, after):
    """Also with strict=False, as the Trainer loads."""
    if type(before) is type(after) and getattr(before, "rank", None) == getattr(after, "rank", None):
        return
    target = trained(layout, after)
    message = r"size mismatch|is a dense weight of shape|in another in the checkpoint, which holds"
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(trained(layout, before).state_dict(), strict=False)


@forms
def test_forms_survive_json(form):
    assert form_from_dict(form_to_dict(form)) == form


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_layer_is_kept(form, dtype):
    layer = convert(trained("linear", Dense()).to(dtype), form).module
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert convert(layer, Dense()).module.weight.dtype == dtype


@forms
def test_layers_can_be_copied_and_pickled(form):
    layer = trained("linear", form)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), layer(X))
        assert convert(other, Dense()).module.weight.shape == (OUT, IN)


@forms
def test_parameters_are_contiguous_and_own_their_storage(form):
    for p in trained("linear", form).parameters():
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
