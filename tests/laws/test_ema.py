"""An average through changes of form is that of the dense effective weights, over all ordered pairs and restarts.

The expected one is calculated in float64 from the layers' own tensors, by nothing of hf_drt's average.
"""

import convolutions
import pytest
import test_experts
import torch
from forms import LAYOUTS, PAIRS, ids, trained
from torch import nn

from hf_drt import EMA, EMADecay
from hf_drt.forms import Adapter, Dense, Factored, FormedLinear, FrozenLinear, convert, layer_of, prepare
from hf_drt.targets import Swap, replace

KEEP = 0.7
CONSTANT = EMADecay(KEEP, warmup=False)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight as the dense layer stores it, in float64 by the products' definitions."""
    if isinstance(layer, FrozenLinear) or not isinstance(layer, FormedLinear):
        return layer._parameters["weight"].detach().double()
    tensors = [p.detach().double() for p in layer.product_tensors()]
    product = layer.product.matrix(tensors)
    stored = layer.layout.stored(product) * layer.form.scaling
    return stored + layer.base.detach().double() if isinstance(layer.form, Adapter) else stored


class Expected:
    """The average by its definition: a copy at the first update, then ``d avg + (1 - d) W``."""

    def __init__(self, read):
        self.read, self.average = read, None

    def update(self) -> None:
        now = self.read()
        old = now if self.average is None else self.average
        self.average = [KEEP * a + (1 - KEEP) * w for a, w in zip(old, now, strict=True)]


def moved(model: nn.Module, seed: int) -> None:
    """An update of everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def follow(model: nn.Module, expected: Expected, change) -> EMA:
    """Three updates, a change of form, three more."""
    ema = EMA(model, CONSTANT)
    for step in range(6):
        if step == 3:
            change()
        moved(model, step)
        ema.update()
        expected.update()
    return ema


def assert_average(ema: EMA, names: list[str], expected: Expected) -> None:
    found = ema.state_dict()["averages"]
    for name, average in zip(names, expected.average, strict=True):
        torch.testing.assert_close(found[name].double(), average, rtol=0, atol=5e-6)


def single(layer: nn.Module, after, names: list[str]) -> None:
    model = nn.ModuleList([layer])

    def read() -> list[torch.Tensor]:
        bias = model[0].bias
        return [dense_weight(model[0]), *([] if bias is None else [bias.detach().double()])]

    def change() -> None:
        model[0] = convert(model[0], after).module

    expected = Expected(read)
    assert_average(follow(model, expected, change), names, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)
def test_the_average_of_a_linear_layer_follows(layout, before, after):
    names = ["0.weight"] if layout == "linear_without_bias" else ["0.weight", "0.bias"]
    single(trained(layout, before), after, names)


@pytest.mark.parametrize("other", [Dense(), Factored(4), Adapter(4, 16.0)], ids=ids)
def test_a_weight_that_is_frozen_in_fewer_bits_is_averaged_as_it_is_kept(other):
    narrow = Dense(frozen=True, dtype="bfloat16")
    single(trained("linear", other), narrow, ["0.weight", "0.bias"])
    single(trained("linear", narrow), other, ["0.weight", "0.bias"])


@pytest.mark.parametrize("geometry", ["3x3", "1d"])
@pytest.mark.parametrize(("before", "after"), convolutions.PAIRS, ids=ids)
def test_the_average_of_a_convolution_follows(geometry, before, after):
    single(convolutions.trained(geometry, before), after, ["0.weight", "0.bias"])


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)
def test_the_average_of_fused_experts_follows(before, after):
    model = test_experts.put(test_experts.model("mixtral"), before)
    names = test_experts.names(model)

    def change() -> None:
        for name in names:
            old = layer_of(model, name)
            conversion = prepare(old, after)
            replace(model, [Swap(name, old, conversion.module)])
            conversion.commit()

    expected = Expected(lambda: [dense_weight(layer_of(model, name)) for name in names])
    assert_average(follow(model, expected, change), names, expected)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)
def test_a_layer_that_a_model_holds_twice_has_one_average(before, after):
    layer = trained("linear", before)
    model = nn.ModuleDict({"a": layer, "b": layer})
    expected = Expected(lambda: [dense_weight(model["b"])])

    def change() -> None:
        model["a"] = model["b"] = convert(layer, after).module

    ema = follow(model, expected, change)
    assert list(ema.state_dict()["averages"]) == ["a.weight", "a.bias"]
    assert_average(ema, ["a.weight"], expected)
    with ema.averaged():
        assert model["a"] is model["b"]
        assert torch.equal(model["b"].weight, ema.state_dict()["averages"]["a.weight"])
