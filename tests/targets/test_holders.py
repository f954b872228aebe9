"""A layer that something else holds stays dense: whatever holds it would go on computing with the old weights."""

import functools
from types import MethodType, SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_drt import DRTConfig, DynamicRank, find_targets
from hf_drt.targets.holders import held_elsewhere

NAME = "model.layers.0.mlp.up_proj"


class Plain:
    """An object of the user's own."""

    def __init__(self, held):
        self.held = held


class Outside(nn.Module):
    """A module that is no part of the model."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def by_forward(mlp, layer):
    own = mlp.forward
    mlp.forward = lambda x: own(x) + layer(x).mean()


def by_hook(mlp, layer):
    mlp.register_forward_hook(lambda module, inputs, output: output + F.linear(inputs[0], layer.weight).mean())


def by_default_argument(mlp, layer):
    def added(module, inputs, output, layer=layer):
        return output + layer(inputs[0]).mean()

    mlp.register_forward_hook(added)


HOLDERS = {
    "a list": lambda mlp, layer: vars(mlp).update(kept=[layer]),
    "a list of weights": lambda mlp, layer: vars(mlp).update(kept=[layer.weight]),
    "a dict in a dict": lambda mlp, layer: vars(mlp).update(kept={"inner": {"list": [layer]}}),
    "a partial": lambda mlp, layer: vars(mlp).update(kept=functools.partial(layer)),
    "an argument of a partial": lambda mlp, layer: vars(mlp).update(
        kept=functools.partial(F.linear, weight=layer.weight)
    ),
    "a bound method": lambda mlp, layer: vars(mlp).update(kept=layer.forward),
    "a method of an object": lambda mlp, layer: vars(mlp).update(kept=MethodType(lambda self: self, Plain(layer))),
    "an object": lambda mlp, layer: vars(mlp).update(kept=Plain(SimpleNamespace(layer=layer))),
    "a module outside": lambda mlp, layer: vars(mlp).update(kept=[Outside(layer)]),
    "a forward of the owner's instance": by_forward,
    "a hook on the owner": by_hook,
    "a default argument of a hook": by_default_argument,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_layer_that_is_held_elsewhere_stays_dense_and_the_others_do_not(hold):
    model = tiny.llama()
    everything = set(find_targets(model).targets)
    hold(model.model.layers[0].mlp, model.get_submodule(NAME))
    selection = find_targets(model)
    assert selection.skipped[NAME] == "held outside of the module tree"
    assert set(selection.targets) == everything - {NAME}


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_nothing_in_a_model_of_transformers_holds_a_layer(kind):
    model = tiny.MODELS[kind]()
    model.gradient_checkpointing_enable()
    held = held_elsewhere(model)
    assert not [name for name, layer in find_targets(model).targets.items() if {id(layer), id(layer.weight)} & held]


def test_an_optimizer_in_an_attribute_follows_and_holds_nothing():
    model = tiny.llama()
    model.kept = Plain(torch.optim.AdamW(model.parameters()))
    assert NAME in find_targets(model).targets


def test_a_circle_of_references_ends():
    model = tiny.llama()
    circle = Plain(None)
    circle.held = [circle, {"model": model}]
    model.kept = circle
    assert NAME in find_targets(model).targets


def test_a_penalty_on_weights_in_a_list_acts_on_what_is_trained():
    """Against autograd on the layers themselves."""
    model = tiny.llama()
    decayed = [layer.mlp.up_proj.weight for layer in model.model.layers]
    model.kept = decayed
    drt = DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=2)
    drt.apply(0)
    sum(weight.pow(2).sum() for weight in model.kept).backward()
    for layer in model.model.layers:
        torch.testing.assert_close(layer.mlp.up_proj.weight.grad, 2 * layer.mlp.up_proj.weight)
