"""Cost grows with the work, not with its square. Counted, not timed: calls of functions, of Python and of C, while a
piece of work is done on models of n, 2n and 4n layers. The second doubling adds twice what the first does where the
cost of a layer is constant, and four times as much where each layer is looked up among all."""

import sys

import pytest
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.targets import find_targets
from hf_drt.targets.holders import held_elsewhere

SIZES = (8, 16, 32)
MOST = 2.2
WORKS = ("find_targets", "first phase", "install", "state_dict", "load_state_dict", "inflation", "deflation", "restore")
SETTINGS = {
    "groups": {"factored_lr_scale": 2.0, "adapter_lr_scale": 0.5},
    "sides": {"left_lr_scale": 2.0, "right_lr_scale": 0.5},
    "project": {"moments": "project", "rewarmup_steps": 2},
}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Block(Pair):
    """Two layers, and lists of further ones: modules that hold layers, sequences of layers, and layers."""

    def __init__(self, count):
        super().__init__()
        self.experts = nn.ModuleList(Pair() for _ in range(count))
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)) for _ in range(count))
        self.flat = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))


class Model(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(Block(count) for _ in range(2))
        self.head = nn.Linear(16, 4)


def in_one_group(model):
    return [{"params": list(model.parameters())}]


def in_a_group_for_each_layer(model):
    found = ([*module.parameters(recurse=False)] for module in model.modules())
    return [{"params": parameters} for parameters in found if parameters]


def calls(work):
    """How many functions are called, and what the work returns."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        result = work()
    finally:
        sys.setprofile(None)
    return count, result


def counts(count, grouped, settings):
    """Calls of every piece of work on a model."""
    torch.manual_seed(0)
    model = Model(count)
    config = DRTConfig(schedule="factored@0 dense@30% adapter@60%", rank=2, **settings)
    found = {"find_targets": calls(lambda: find_targets(model))[0]}
    drt = DynamicRank(model, config, max_steps=10)
    found["first phase"], _ = calls(lambda: drt.apply(0))
    optimizer = torch.optim.AdamW(grouped(model), lr=1e-3)
    found["install"], _ = calls(lambda: drt.install(optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found["inflation"], _ = calls(lambda: drt.apply(3, optimizer))
    back = drt.remembered()
    found["deflation"], _ = calls(lambda: drt.apply(6, optimizer))
    found["state_dict"], state = calls(drt.state_dict)
    found["restore"], _ = calls(back)
    model = Model(count)
    other = DynamicRank(model, config, max_steps=10)
    other.apply(0)
    optimizer = torch.optim.AdamW(grouped(model), lr=1e-3)
    other.install(optimizer)
    found["load_state_dict"], _ = calls(lambda: other.load_state_dict(state, optimizer))
    return found


@pytest.mark.parametrize(
    ("settings", "grouped"),
    [("groups", in_one_group), ("project", in_one_group), ("project", in_a_group_for_each_layer)],
)
def test_the_calls_for_each_layer_do_not_grow_with_the_layers(settings, grouped):
    counts(1, grouped, SETTINGS[settings])  # what is read and cached once
    small, middle, large = (counts(size, grouped, SETTINGS[settings]) for size in SIZES)
    growth = {work: (large[work] - middle[work]) / (middle[work] - small[work]) for work in WORKS}
    assert {work: value for work, value in growth.items() if value > MOST} == {}


def test_what_all_layers_hold_is_gone_through_a_fixed_number_of_times():
    def held(count):
        model = Model(count)
        everything = list(model.modules())
        for module in everything:
            module.layers = tuple(everything) if module is model else model.layers
        found, result = calls(lambda: held_elsewhere(model))
        assert result == {id(module) for module in everything}  # the list holds them, and is no module's own
        return found

    held(1)
    small, middle, large = map(held, SIZES)
    assert (large - middle) / (middle - small) < MOST
