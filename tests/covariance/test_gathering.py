"""Gathering counts each input of training once, and leaves nothing behind."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_drt.covariance import Gathering, covariances_of
from hf_drt.engines import engine_of


class Net(nn.Module):
    def __init__(self, checkpointed: str | None = None):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)
        self.checkpointed = checkpointed

    def body(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        if self.checkpointed is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.checkpointed == "reentrant")


def net(**changes) -> Net:
    torch.manual_seed(0)
    return Net(**changes)


def layers(model, *names):
    return {name: model.get_submodule(name) for name in names or ("first", "second")}


def batches(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(5, 2, 4) for _ in range(count)]


def expected(model, inputs) -> dict[str, torch.Tensor]:
    X = torch.cat(inputs).reshape(-1, 4)
    with torch.no_grad():
        H = torch.tanh(nn.functional.linear(X, model.first.weight, model.first.bias))  # with no hook
    return {"first": X.mT @ X / len(X), "second": H.mT @ H / len(H)}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def trained(model, gathering, inputs, call=None):
    for x in inputs:
        gathering.follow(layers(model), engine_of(model))
        (model if call is None else call)(x.clone().requires_grad_()).square().sum().backward()


@pytest.mark.parametrize("how", [None, "reentrant", "not reentrant"])
def test_every_input_counts_once_also_where_blocks_are_repeated(how):
    model, gathering = net(checkpointed=how), Gathering()
    trained(model, gathering, batches())
    assert_close(gathering.taken(), expected(model, batches()))


def test_evaluation_between_adds_nothing():
    model, gathering = net(), Gathering()
    trained(model, gathering, batches()[:2])
    model.eval()(batches()[2])
    model.train()
    trained(model, gathering, batches()[2:])
    assert_close(gathering.taken(), expected(model, batches()))


def test_the_state_has_the_last_update_too():
    """A loop saves before its next update begins, which is where an update's end is seen."""
    model, gathering, again = net(), Gathering(), Gathering()
    trained(model, gathering, batches()[:1])
    again.load_state_dict(gathering.state_dict())
    gathering.drop()
    trained(model, again, batches()[1:])
    assert_close(again.taken(), expected(model, batches()))


def test_no_hook_is_left_and_nothing_counts_after():
    model, gathering = net(), Gathering()
    trained(model, gathering, batches())
    assert model.first._forward_pre_hooks
    found = gathering.taken()
    assert not model.first._forward_pre_hooks
    model(batches()[0])
    assert_close(gathering.taken(), found)
    gathering.drop()
    assert gathering.taken() == gathering.state_dict() == {}


def test_a_following_update_without_layers_drops_all():
    model, gathering = net(), Gathering()
    trained(model, gathering, batches())
    gathering.follow({}, engine_of(model))
    assert gathering.names == []
    assert not model.first._forward_pre_hooks


def test_a_compiled_model_is_seen_and_goes_on_compiled():
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, gathering = net(), Gathering()
    compiled = torch.compile(model, backend=counting)
    compiled(batches()[0].requires_grad_())
    graphs = len(calls)
    trained(model, gathering, batches(), compiled)
    assert_close(gathering.taken(), expected(model, batches()))
    compiled(batches()[0].requires_grad_())
    assert graphs
    assert len(calls) == graphs, "compiled anew"
    torch._dynamo.reset()


def test_it_goes_on_from_its_state_with_the_same_bits():
    model, whole, first, second = net(), Gathering(), Gathering(), Gathering()
    trained(model, whole, batches())
    expected_bits = whole.taken()
    trained(model, first, batches()[:2])
    first.fold()
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.drop()
    second.load_state_dict(state)
    trained(model, second, batches()[2:])
    for name, C in expected_bits.items():
        assert torch.equal(C, second.taken()[name])
    third = Gathering()
    third.load_state_dict(state)  # a checkpoint of the very end
    assert_close(third.taken(), expected(model, batches()[:2]))


def test_a_state_of_other_layers_is_refused():
    model, gathering, other = net(), Gathering(), Gathering()
    trained(model, gathering, batches())
    other.load_state_dict(gathering.state_dict())
    with pytest.raises(ValueError, match=r"gathered of other layers than are to be truncated next\. Resume with the"):
        other.follow(layers(model, "first"), engine_of(model))
    gathering.drop()


def test_a_layer_without_an_input_is_told_of_and_left_out(caplog):
    model, gathering = net(), Gathering()
    gathering.follow(layers(model, "first", "unused"), engine_of(model))
    model(batches()[0])
    with caplog.at_level(logging.WARNING):
        assert list(gathering.taken()) == ["first"]
    assert "1 layers, such as unused, had no input in the last updates before they are truncated" in caplog.text


def test_a_copy_has_the_sums_and_gathers_nothing_of_the_original():
    model, gathering = net(), Gathering()
    trained(model, gathering, batches()[:1])
    twin, own = copy.deepcopy((model, gathering))
    twin(batches()[1])
    assert_close(own.taken(), expected(model, batches()[:1]))
    trained(model, gathering, batches()[1:])
    assert_close(gathering.taken(), expected(model, batches()))


# ---- of batches that are given


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: {"x": x}, lambda x: (x,), lambda x: [x]])
def test_calibration_takes_batches_of_every_kind(kind):
    model = net()
    model.first.eval()
    found = covariances_of(model, layers(model), (kind(x) for x in batches()))
    assert_close(found, expected(model, batches()))
    assert [m.training for m in (model, model.first, model.second)] == [True, False, True]
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, r"calibration has no batch\. An iterator that has been used up gives none"),
        (torch.ones(2, 4), TypeError, r"must be an iterable of batches, got a Tensor\. .*: \[batch\]"),
        ({"x": torch.ones(2, 4)}, TypeError, r"must be an iterable of batches, got a dict"),
        (7, TypeError, r"must be an iterable of batches, got a int"),
        (["text"], TypeError, r"must be a mapping, a tuple or list, or a tensor, got a str"),
    ],
)
def test_what_is_no_calibration_is_refused_and_nothing_is_left(calibration, error, message):
    model = net()
    with pytest.raises(error, match=message):
        covariances_of(model, layers(model), calibration)
    assert model.training
    assert not model.first._forward_pre_hooks
