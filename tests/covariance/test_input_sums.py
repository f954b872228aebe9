"""Layers with one input share their sum in calibration, and part where they are given different ones."""

import pytest
import tiny
import torch
from torch import nn

from hf_drt import find_targets
from hf_drt.covariance import covariances_of
from hf_drt.forms import layer_of


class Net(nn.Module):
    """Calls its layers as a batch says: pairs of a layer and of which of the batch's tensors it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, out) for out in (6, 3, 4))

    def forward(self, calls, *inputs):
        for name, index in calls:
            if name == "changed":
                inputs[index].mul_(2)
            else:
                getattr(self, name)(inputs[index])


TOGETHER = (("a", 0), ("b", 0), ("c", 0))
LATER = {
    "the same again": (TOGETHER, True),
    "another for the second": ((("a", 0), ("b", 1), ("c", 0)), False),
    "another for the first": ((("a", 1), ("b", 0), ("c", 0)), False),
    "none for one": ((("a", 0), ("c", 0)), False),
    "none for the first two": ((("c", 0),), True),
    "one twice": ((("a", 0), ("a", 1), ("b", 0), ("c", 0)), False),
    "all twice": (TOGETHER + tuple((name, 1) for name, _ in TOGETHER), True),
    "changed in place between": ((("a", 0), ("changed", 0), ("b", 0), ("c", 0)), False),
    "in another order": (TOGETHER[::-1], True),
}


def by_hand(batches, name):
    rows = []
    for calls, *inputs in batches:
        inputs = [x.clone() for x in inputs]
        for layer, index in calls:
            if layer == "changed":
                inputs[index].mul_(2)
            elif layer == name:
                rows.append(inputs[index].clone())
    X = torch.cat(rows).double()
    return X.mT @ X / len(X)


@pytest.mark.parametrize("first", [TOGETHER, LATER["changed in place between"][0], LATER["one twice"][0]])
@pytest.mark.parametrize("later", LATER)
def test_each_has_the_moments_of_its_own_inputs_whatever_the_model_does(first, later):
    torch.manual_seed(1)
    batches = [(calls, torch.randn(5, 6), torch.randn(3, 6)) for calls in (first, LATER[later][0], TOGETHER)]
    expected = {name: by_hand(batches, name) for name in "abc"}
    net = Net()
    C = covariances_of(
        net, {name: getattr(net, name) for name in "abc"}, [(c, *map(torch.clone, x)) for c, *x in batches]
    )
    for name in "abc":
        torch.testing.assert_close(C[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    if first == TOGETHER:
        assert (C["a"].data_ptr() == C["b"].data_ptr()) == LATER[later][1]


def test_in_a_block_queries_keys_and_values_share_one_and_gate_and_up():
    model = tiny.llama()
    layers = {name: layer_of(model, name) for name in find_targets(model).targets}
    C = covariances_of(model, layers, [tiny.batch(), tiny.batch(rows=3)])
    for name, moments in C.items():
        alone = covariances_of(model, {name: layers[name]}, [tiny.batch(), tiny.batch(rows=3)])
        assert torch.equal(alone[name], moments)
    held = {name: moments.data_ptr() for name, moments in C.items()}
    assert len(set(held.values())) == 4 * len(model.model.layers)
    for name, pointer in held.items():
        for one, other in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            if name.endswith(one):
                assert pointer == held[name.replace(one, other)]


def test_tensors_made_in_inference_mode_are_not_shared():
    net, x = Net(), None
    with torch.inference_mode():
        x = torch.randn(5, 6)
    with torch.inference_mode():
        C = covariances_of(net, {name: getattr(net, name) for name in "ab"}, [(TOGETHER, x)])
    assert C["a"].data_ptr() != C["b"].data_ptr()
    assert torch.equal(C["a"], C["b"])


def test_layers_of_two_dtypes_have_their_own():
    net = Net()
    net.b = nn.Linear(6, 3).bfloat16()
    x = torch.randn(5, 6)
    layers = {"a": net.a, "b": net.b}
    with torch.autocast("cpu", torch.bfloat16):
        C = covariances_of(net, layers, [(TOGETHER, x)])
    assert C["a"].data_ptr() != C["b"].data_ptr()


def test_a_layer_without_an_input_is_left_out_and_told_of(caplog):
    net = Net()
    C = covariances_of(net, {name: getattr(net, name) for name in "ab"}, [((("a", 0),), torch.randn(5, 6))])
    assert set(C) == {"a"}
    assert "1 layers, such as b, had no input in the calibration" in caplog.text
