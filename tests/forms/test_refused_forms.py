"""Forms that a layer cannot have, and weights that cannot be decomposed, are refused."""

import math

import pytest
from torch import nn

from hf_drt import Adapter, Dense, Factored, convert, empty_like
from hf_drt.forms import form_from_dict


def linear(value: float | None = None) -> nn.Linear:
    layer = nn.Linear(8, 6)
    if value is not None:
        layer.weight.data[0, 0] = value
    return layer


@pytest.mark.parametrize("make", [convert, empty_like])
@pytest.mark.parametrize("form", [Factored(7), Adapter(7)], ids=str)
def test_a_rank_outside_of_the_layer_is_refused(make, form):
    message = rf"rank must lie in 1\.\.6 for a layer of shape \(out, in\) = \(6, 8\), got {form.rank}\."
    with pytest.raises(ValueError, match=message):
        make(linear(), form)


@pytest.mark.parametrize("make", [convert, empty_like])
@pytest.mark.parametrize("form", ["dense", None, Dense], ids=str)
def test_what_is_no_form_is_refused(make, form):
    with pytest.raises(
        TypeError, match=r"the form must be Dense\(\), Factored\(rank\) or Adapter\(rank, alpha, init\), got "
    ):
        make(linear(), form)


@pytest.mark.parametrize("make", [Factored, Adapter])
@pytest.mark.parametrize("rank", [2.5, "2", True, 0, -1])
def test_a_rank_that_is_no_whole_number_is_refused(make, rank):
    with pytest.raises(ValueError, match=rf"rank must be a whole number of at least 1, got {rank!r}"):
        make(rank)


def test_an_unknown_start_of_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"init.*principle"):
        convert(linear(), Adapter(2, init="principle"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [Factored(2), Adapter(2, init="principal")], ids=str)
def test_a_weight_that_is_not_finite_is_not_decomposed(form, value):
    layer = linear(value)
    with pytest.raises(
        ValueError,
        match=r"weight of a layer of shape \(out, in\) = \(6, 8\) holds inf or nan\. The training has diverged",
    ):
        convert(layer, form)
    assert type(layer) is nn.Linear


def test_factors_that_are_not_finite_are_not_decomposed():
    factored = convert(linear(), Factored(2)).module
    factored.U.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds inf or nan"):
        convert(factored, Factored(1))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"form": "lora", "rank": 4},
        {"form": "Factored", "rank": 4},
        {"form": "factored"},
        {"form": "factored", "rank": 4, "alpha": 16},
        {"form": "dense", "rank": 4},
        {"rank": 4},
    ],
)
def test_a_dict_that_describes_no_form_is_refused(data):
    with pytest.raises(
        ValueError, match=r"describes no form; allowed are dense \(frozen\), factored \(rank\) and adapter \(rank, al"
    ):
        form_from_dict(data)
