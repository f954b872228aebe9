"""Gradients projected on the leading directions of inputs, against a calculation by hand in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_drt.covariance import GradientProjection
from hf_drt.forms import Factored, convert

RATE, BETA = 0.1, 0.5


class Net(nn.Module):
    def __init__(self, first: nn.Module):
        super().__init__()
        self.first, self.second = first, nn.Linear(9, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def stepped(net, rule, inputs):
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    rule.install(optimizer)
    gradients = []
    for step, x in enumerate(inputs):
        rule.begin_step(step)
        net(x).square().mean().backward()
        gradients.append(net.first.weight.grad.clone())
        before = net.first.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    rule.leave()
    return before, gradients


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 9), lambda: Conv1D(9, 6)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_a_step_is_that_of_the_calculation_by_hand_and_eigenvectors_last_a_period(make, beta):
    torch.manual_seed(0)
    net = Net(make()).double()
    inputs = torch.randn(3, 20, 6, dtype=torch.float64) * torch.arange(1, 7)
    before, gradients = stepped(net, GradientProjection(net, ["first"], k=2, period=2, sharpness=beta), inputs[:2])
    W, G = (t.mT if isinstance(net.first, Conv1D) else t for t in (before, gradients[1]))
    values, Q = torch.linalg.eigh(inputs[0].mT @ inputs[0])  # of the first update of the period
    E, e = Q[:, -2:], Q[:, -1:]
    expected = W - RATE * beta * values[-1] / values.sum() * W @ e @ e.mT - RATE * G @ E @ E.mT
    after = net.first.weight.detach()
    torch.testing.assert_close(after.mT if isinstance(net.first, Conv1D) else after, expected)
    assert not net.first._forward_pre_hooks


def test_layers_in_low_rank_or_of_few_inputs_are_passed_over():
    torch.manual_seed(0)
    net = Net(convert(nn.Linear(6, 9), Factored(2)).module).double()
    rule = GradientProjection(net, ["first", "second"], k=9, period=1, sharpness=BETA)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    rule.install(optimizer)
    rule.begin_step(0)
    net(torch.randn(20, 6, dtype=torch.float64)).square().mean().backward()
    expected = [p.detach() - RATE * p.grad for p in net.parameters()]
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in net.parameters()], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, r"k must be a whole number of at least 1, got 0"),
        ({"period": 1.5}, r"period must be a whole number of at least 1, got 1\.5"),
        ({"sharpness": -1.0}, r"sharpness must be a number of at least 0, got -1\.0"),
    ],
)
def test_values_outside_their_intervals_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GradientProjection(Net(nn.Linear(6, 9)), ["first"], **{"k": 2, "period": 2, **values})
