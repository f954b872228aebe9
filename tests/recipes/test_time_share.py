"""The share of a step that the target layers take, by the shapes of a profile's products."""

import pytest
import time_share
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


@pytest.mark.parametrize(("bias", "tokens"), [(True, 40), (False, 7)])
def test_the_products_of_a_layer_are_told_from_others(bias, tokens):
    layer, head = nn.Linear(24, 16, bias=bias), nn.Linear(16, 50)
    x = torch.randn(tokens, 24, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        head(layer(x)).sum().backward()
    products = [e for e in seen.key_averages(group_by_input_shape=True) if e.key in time_share.PRODUCTS]
    own = [e for e in products if time_share._is_of(e.input_shapes, {frozenset((24, 16))})]
    assert sum(time_share._multiply_adds(e.input_shapes) * e.count for e in own) == 3 * tokens * 24 * 16
    everything = sum(time_share._multiply_adds(e.input_shapes) * e.count for e in products)
    assert everything == 3 * tokens * (24 * 16 + 16 * 50)
