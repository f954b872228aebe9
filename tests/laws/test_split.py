"""Adapters that are split as their rank changes: the same function, by the closed form in float64, up and down."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_drt.forms import (
    Adapter,
    AdapterLinear,
    Dense,
    ExpertStack,
    Factored,
    LowRankLinear,
    convert,
    decompose,
    decomposition_shapes,
    effective_weight,
    form_of,
    layout_of,
    trainable_weights,
)

LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (5, 40)),
    "wide": (lambda: nn.Linear(160, 144, bias=False), (5, 160)),
    "conv1d of GPT-2": (lambda: Conv1D(24, 40), (5, 40)),
    "Conv1d": (lambda: nn.Conv1d(12, 32, 5, stride=2, padding=2), (2, 12, 17)),
    "Conv2d": (lambda: nn.Conv2d(6, 24, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 9)),
    "experts": (lambda: ExpertStack(nn.Parameter(torch.randn(3, 24, 40) / 6), True), None),
}  # of experts that are stored as (E, in, out)
layers = pytest.mark.parametrize("name", LAYERS)
CHANGES = [(16, 16), (16, 9), (9, 1), (1, 7), (7, 24)]
changes = pytest.mark.parametrize(("before", "after"), CHANGES)


def split(rank: int, alpha: float | None = None) -> Adapter:
    return Adapter(rank, float(rank) if alpha is None else alpha, "split")


def trained(name: str, form: Adapter, dtype: torch.dtype = torch.float32) -> AdapterLinear:
    """An adapter that has moved by some tenths of itself."""
    torch.manual_seed(0)
    layer = convert(LAYERS[name][0]().to(dtype), form).module
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainable_weights(layer):
            weight.add_(torch.randn_like(weight), alpha=0.3 * weight.std().item())
    return layer


def output(name: str, layer: nn.Module) -> Tensor:
    shape = LAYERS[name][1]
    generator = torch.Generator().manual_seed(2)
    if shape is None:  # expert by expert, as the loop of a model reads the weight
        x = torch.randn(3, 5, 24, generator=generator)
        return torch.stack([x[e] @ layer.weight[e] for e in range(3)])
    return layer(torch.randn(shape, generator=generator))


def closed_form(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """The base and the product ``s L R``, both in float64."""
    L, R, s = layer.pair()
    return layout_of(layer).matrix(layer.base).double(), s * L.double() @ R.double()


def top(W: Tensor, rank: int) -> Tensor:
    """The best approximation in float64, of each expert for itself."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]


def far(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@layers
@changes
@pytest.mark.parametrize("alphas", [(None, None), (6.0, 20.0)], ids=str)
def test_every_change_of_rank_keeps_the_function(name, before, after, alphas):
    layer = trained(name, split(before, alphas[0]))
    W, y = sum(closed_form(layer)), output(name, layer)
    new = convert(layer, split(after, alphas[1])).module
    assert form_of(new) == split(after, alphas[1])
    assert far(sum(closed_form(new)), W) <= 1e-6
    assert far(output(name, new), y) <= 1e-5
    assert all(p.is_contiguous() for p in new.parameters())


@layers
@changes
def test_what_is_kept_and_what_the_base_takes_or_gives(name, before, after):
    layer = trained(name, split(before))
    base, product = closed_form(layer)
    new_base, new_product = closed_form(convert(layer, split(after)).module)
    kept = top(product, after) if after <= before else product + top(base, after - before)
    size, left = (base + product).norm(), base + product - kept
    # A large base is not decomposed whole: what is taken of it is near the best in what it leaves.
    assert new_base.norm() <= 1.003 * left.norm() + 1e-5 * size
    if after <= before or name != "wide":
        assert (new_product - kept).norm() <= 1e-5 * size
        assert (new_base - left).norm() <= 1e-5 * size


@layers
def test_the_first_split_is_the_principal_one(name):
    torch.manual_seed(0)
    dense = LAYERS[name][0]()
    principal = convert(copy.deepcopy(dense), Adapter(8, 8.0, "principal")).module
    new = convert(dense, split(8)).module
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), principal.parameters(), strict=True))


@layers
def test_both_factors_are_balanced_after_a_split(name):
    L, R, _ = convert(trained(name, split(12)), split(5)).module.pair()
    torch.testing.assert_close(L.mT @ L, R @ R.mT, atol=1e-5, rtol=1e-5)


@layers
def test_a_split_down_decomposes_nothing_that_is_larger_than_the_rank(name, monkeypatch):
    layer = trained(name, split(9))
    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **options: seen.append(A.shape) or svd(A, **options))
    convert(layer, split(4))
    assert set(seen) == {(9, 9)}


@layers
def test_the_frozen_base_keeps_its_object_and_the_bias_too(name):
    layer = trained(name, split(9))
    base, bias = layer.base, layer.bias
    for rank in (4, 12):
        layer = convert(layer, split(rank)).module
        assert layer.base is base
        assert layer.bias is bias
        assert not base.requires_grad
        assert all(weight.requires_grad for weight in trainable_weights(layer))
    assert trainable_weights(convert(layer, Dense()).module)[0] is base


@layers
@changes
def test_a_process_knows_the_shapes_of_what_another_one_sends(name, before, after):
    layer = trained(name, split(before))
    shapes = decomposition_shapes(layer, split(after))
    assert shapes == tuple(tuple(part.shape) for part in decompose(layer, split(after)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_base_takes_up_what_a_cast_of_the_factors_costs(dtype):
    layer = trained("wide", split(16), dtype)
    W = sum(closed_form(layer))
    new = convert(layer, split(6)).module
    assert new.lora_A.dtype == new.base.dtype == dtype
    assert far(sum(closed_form(new)), W) <= max(torch.finfo(dtype).eps / 2, 1e-15)


def test_directions_that_were_nothing_can_learn_after_a_split():
    """A weight of rank 3: the other directions are zero in one factor, and random in the other."""
    torch.manual_seed(0)
    dense = nn.Linear(40, 24)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(24, 3) @ torch.randn(3, 40))
    layer = convert(dense, split(6)).module
    W = sum(closed_form(layer))
    for rank in (5, 8):
        layer = convert(layer, split(rank)).module
        assert far(sum(closed_form(layer)), W) <= 1e-6
        assert (layer.lora_A.norm(dim=1) > 0).all()
        layer(torch.randn(7, 40)).square().sum().backward()
        assert (layer.lora_B.grad.norm(dim=0) > 0).all()


def test_an_adapter_of_another_start_is_split_too():
    layer = convert(nn.Linear(40, 24), Adapter(6, 16.0)).module
    nn.init.normal_(layer.lora_B, std=0.1)
    base, product = closed_form(copy.deepcopy(layer))
    new_base, new_product = closed_form(convert(layer, split(4)).module)
    assert far(new_product, top(product, 4)) <= 1e-5
    assert far(new_base + new_product, base + product) <= 1e-6


@pytest.mark.parametrize("other", [Factored(9), Adapter(4, 8.0, "principal"), Dense()], ids=str)
def test_other_forms_come_from_it_and_go_to_it(other):
    """From factors the principal directions are theirs, and the base is what rounding has left."""
    layer = trained("linear", split(9))
    W = sum(closed_form(layer))
    new = convert(layer, other)
    assert far(effective_weight(new.module).double(), W) == pytest.approx(new.error, abs=1e-6)
    W = effective_weight(new.module).double()
    base, product = closed_form(convert(new.module, split(12)).module)
    assert far(base + product, W) <= 1e-6
    if isinstance(other, Factored):
        assert base.norm() <= 1e-5 * W.norm()
