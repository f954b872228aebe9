"""A frozen W: the function is kept, nothing of W is trained, and in bfloat16 it takes two bytes a weight."""

import copy
import io

import pytest
import tiny
import torch
from forms import FORMS, IN, LAYOUTS, OUT, ids, trained
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    FrozenLinear,
    convert,
    effective_weight,
    empty_like,
    form_from_dict,
    form_of,
    form_to_dict,
    frozen_by_user,
    trainable_weights,
)

FROZEN = [Dense(frozen=True), Dense(frozen=True, dtype="bfloat16")]
frozen_forms = pytest.mark.parametrize("frozen", FROZEN, ids=ids)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
forms = pytest.mark.parametrize("form", [*FORMS, FROZEN[1]], ids=ids)
BF16 = 2**-8  # the largest relative error of rounding to bfloat16
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))


@layouts
@forms
@frozen_forms
def test_every_form_freezes_and_comes_back(layout, form, frozen):
    layer = trained(layout, form)
    W = effective_weight(layer).clone()
    held = convert(layer, frozen).module
    kept = effective_weight(held).clone()
    assert form_of(held) == frozen
    assert ((kept - W).abs() <= (BF16 if frozen.dtype else 1e-6) * W.abs() + 1e-6).all()
    if frozen.dtype:
        assert torch.equal(kept, kept.bfloat16().float())
    for after in (Dense(), Factored(OUT), Adapter(4, 8.0)):
        back = convert(copy.deepcopy(held), after).module
        assert (effective_weight(back) - kept).abs().max() <= 1e-5
        assert {p.dtype for p in back.parameters()} == {torch.float32}
        assert all(weight.requires_grad for weight in trainable_weights(back))


@layouts
@frozen_forms
def test_gradients_are_those_of_a_plain_linear_layer_with_a_constant_weight(layout, frozen):
    layer = convert(trained(layout, Dense()), frozen).module
    plain = nn.Linear(IN, OUT, bias=layer.bias is not None)
    plain.weight = nn.Parameter(effective_weight(layer).clone(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    for shape in ((IN,), (5, IN), (2, 3, IN), (0, IN)):
        x = torch.randn(shape, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        for module, inputs in ((layer, x), (plain, y)):
            module.zero_grad()
            module(inputs).square().sum().backward()
        assert torch.allclose(layer(x), plain(y), atol=1e-6)
        assert torch.allclose(x.grad, y.grad, atol=1e-5)
        if layer.bias is not None:
            assert torch.allclose(layer.bias.grad, plain.bias.grad, atol=1e-5)
        assert trainable_weights(layer)[0].grad is None


def test_gradients_of_widened_weights_are_those_of_finite_differences():
    layer = convert(nn.Linear(4, 3).double(), FROZEN[1]).module
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: torch.func.functional_call(layer, {"bias": b}, x), (x, layer.bias))


def test_a_bfloat16_weight_takes_two_bytes_and_autograd_keeps_no_copy_of_it():
    layer = convert(nn.Linear(IN, OUT), FROZEN[1]).module
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(X.clone().requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * OUT * IN
    assert trainable_weights(layer)[0].element_size() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@frozen_forms
def test_autocast_computes_in_its_dtype(frozen, dtype):
    layer = convert(nn.Linear(IN, OUT), frozen).module
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict({"weight": effective_weight(layer), "bias": layer.bias})
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found, expected = layer(x), plain(y)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)


@frozen_forms
def test_the_compiled_layer_computes_the_same(frozen):
    layer = convert(nn.Linear(IN, OUT), frozen).module
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert torch.equal(compiled(x), layer(y))
    compiled(x).sum().backward()
    layer.bias.grad = None
    layer(y).sum().backward()
    assert torch.allclose(x.grad, y.grad)


@layouts
def test_a_bfloat16_layer_can_be_copied_pickled_and_saved(layout):
    layer = convert(trained(layout, Dense()), FROZEN[1]).module
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert form_of(other) == FROZEN[1]
        assert torch.equal(other(X), layer(X))
        assert convert(other, Dense()).module.weight.dtype == torch.float32
    empty = empty_like(trained(layout, Factored(4)), FROZEN[1])
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(X), layer(X))
    assert not trainable_weights(empty)[0].requires_grad
    assert trainable_weights(empty)[0].dtype == torch.bfloat16
    dense = trained(layout, Dense())
    dense.load_state_dict(layer.state_dict())  # it loads where a dense layer does
    assert torch.equal(effective_weight(dense), effective_weight(layer))


@pytest.mark.parametrize("form", [*FROZEN, Factored(4), Adapter(4, 8.0)], ids=ids)
def test_what_the_user_has_frozen_stays_frozen(form):
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    for step in (form, *FROZEN, Adapter(2, 8.0), FROZEN[1], Factored(3), FROZEN[0], Dense()):
        layer = convert(layer, step).module
        assert frozen_by_user(layer)
        assert not any(weight.requires_grad for weight in trainable_weights(layer))


def test_what_a_form_has_frozen_is_trained_again():
    layer = nn.Linear(IN, OUT)
    for step in (*FROZEN, FROZEN[0], Adapter(2, 8.0), FROZEN[1], Factored(3), *FROZEN, Dense()):
        layer = convert(layer, step).module
        assert not frozen_by_user(layer)
    assert layer.weight.requires_grad
    assert form_of(layer) == Dense()


def test_w_keeps_its_object_between_dense_frozen_and_adapter_form():
    layer = nn.Linear(IN, OUT)
    W, bias = layer.weight, layer.bias
    for form in (FROZEN[0], Adapter(4, 8.0), FROZEN[0], Dense()):
        layer = convert(layer, form).module
        assert (layer.base if isinstance(form, Adapter) else layer.weight) is W
        assert layer.bias is bias
        assert bias.requires_grad


def test_freezing_drops_the_gradient():
    layer = nn.Linear(IN, OUT)
    layer(X).sum().backward()
    assert trainable_weights(convert(layer, FROZEN[0]).module)[0].grad is None


def test_to_another_dtype_the_layer_follows_whole():
    for cast, dtype in ((nn.Module.double, torch.float64), (nn.Module.half, torch.float16)):
        layer = cast(convert(nn.Linear(IN, OUT), FROZEN[1]).module)
        assert layer(X.to(dtype)).dtype == dtype
        assert layer.weight.dtype == dtype
        assert convert(layer, Dense()).module.weight.dtype == dtype


def test_the_attribute_weight_has_the_dtype_of_the_layer():
    """The T5 family casts what goes into a layer to the dtype of its weight."""
    model, plain = tiny.t5().eval(), tiny.t5().eval()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 frozen@50%", frozen_dtype="bfloat16"), 2)
    drt.apply(1)
    for name in drt.targets:
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
        assert isinstance(layer, FrozenLinear)
        assert (layer.weight.dtype, layer.weight.shape) == (weight.dtype, weight.shape)
        weight.data = weight.data.bfloat16().float()
        assert torch.equal(layer.weight + 0, weight)
    assert torch.equal(tiny.logits(model, tiny.batch("t5")), tiny.logits(plain, tiny.batch("t5")))


@pytest.mark.parametrize("kind", ["resnet", "mixtral", "vit", "gpt2"])
def test_models_of_every_kind_compute_the_same_with_frozen_layers(kind):
    model = getattr(tiny, kind)()
    batch = tiny.batch("llama" if kind in ("mixtral", "gpt2") else kind)
    expected = tiny.logits(model, batch)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 frozen@50%"), 2)
    drt.apply(0)
    drt.apply(1)
    assert {form_of(drt._layer(name)) for name in drt.targets} == {FROZEN[0]}
    assert torch.equal(tiny.logits(model, batch), expected)
    model.train()
    model(**batch).loss.backward()
    owned = {id(weight) for name in drt.targets for weight in trainable_weights(drt._layer(name))}
    assert all((p.grad is None) == (id(p) in owned) for p in model.parameters())
    again = copy.deepcopy(model)
    assert {form_of(DynamicRank(again, "dense@0", 2)._layer(name)) for name in drt.targets} == {FROZEN[0]}
    drt.to_dense()
    assert {form_of(drt._layer(name)) for name in drt.targets} == {Dense()}
    assert all(p.requires_grad for p in model.parameters())


def test_numbers_of_parameters_and_products():
    assert [form.parameters(OUT, IN) for form in (Dense(), *FROZEN)] == [OUT * IN, 0, 0]
    assert [form.flops(OUT, IN) for form in (Dense(), *FROZEN)] == [3 * OUT * IN, 2 * OUT * IN, 2 * OUT * IN]


def test_forms_survive_json_and_are_printed():
    for form, text in zip((Dense(), *FROZEN), ("", "frozen=True", "frozen=True, dtype='bfloat16'"), strict=True):
        assert form_from_dict(form_to_dict(form)) == form
        assert repr(form) == f"Dense({text})"
    assert form_to_dict(Dense()) == {"form": "dense"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frozen": True, "dtype": "float16"}, r"dtype is of a frozen weight, and 'bfloat16' or None; got 'float16'"),
        ({"dtype": "bfloat16"}, r"dtype is of a frozen weight, .*got 'bfloat16' of Dense\(dtype='bfloat16'\)"),
        ({"frozen": 1}, r"frozen must be True or False, got 1"),
    ],
)
def test_bad_forms_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Dense(**fields)
    with pytest.raises(ValueError, match=r"describes no form; allowed are dense \(frozen\), factored"):
        form_from_dict({"form": "dense", **fields})


def test_bfloat16_is_refused_of_convolutions():
    message = r"Dense\(frozen=True, dtype='bfloat16'\) is a form of linear layers, and of no convolution or"
    with pytest.raises(ValueError, match=message):
        convert(nn.Conv2d(4, 4, 3), FROZEN[1])


def test_frozen_dtype_is_refused_where_no_layer_is_linear():
    message = r"frozen_dtype is 'bfloat16', .*none of the \d+ target layers is a linear one.* Include linear layers"
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.resnet(), DRTConfig(schedule="dense@0 frozen@50%", frozen_dtype="bfloat16"), 2)
