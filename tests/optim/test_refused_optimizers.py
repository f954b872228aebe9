"""An optimizer without a rule that does not pass a trial is refused by its full name; its name alone says nothing."""

import pytest
import torch
from torch import nn

from hf_drt.optim import OPTIMIZERS, rule_of


class OtherAdam(torch.optim.Adam):
    """Third parties' subclasses may keep state that the rule of their base does not know."""

    def __init__(self, params):
        super().__init__(params)
        self.first = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}


class AdamW(torch.optim.SGD):
    """Has the name of a supported one, as bitsandbytes' AdamW."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "name", "seen"),
    [
        (torch.optim.LBFGS, r"torch\.optim\.lbfgs\.LBFGS", r"TypeError: .* argument: 'closure'"),
        (torch.optim.SparseAdam, r"torch\.optim\.sparse_adam\.SparseAdam", r"RuntimeError: .* dense gradients"),
        (OtherAdam, r"test_refused_optimizers\.OtherAdam", r"keeps a tensor of shape \(2, 2\) in first"),
        (AdamW, r"test_refused_optimizers\.AdamW", r"TypeError: .* argument: 'closure'"),
    ],
)
def test_an_optimizer_that_does_not_pass_is_refused_by_its_full_name(make, name, seen):
    optimizer = make([nn.Parameter(torch.zeros(2, 2))])
    message = (
        rf"the optimizer (\w+\.)*{name} cannot follow a change of form: it has no rule, .*{seen}.* Of the \d+ that "
        r"can, \S+, \S+ or \S+ is nearest by name; docs/optimizers\.md has all\. So can classes without a rule that "
        r"pass a trial\. In a Trainer optim=adamw_torch always can\."
    )
    with pytest.raises(ValueError, match=message):
        rule_of(optimizer)


def test_one_that_is_derived_from_a_known_one_does_not_have_its_moments():
    class Derived(torch.optim.Adam):
        pass

    rule = rule_of(Derived([nn.Parameter(torch.zeros(2, 2))]))
    assert OPTIMIZERS["torch.optim.adam.Adam"].moments.first
    assert not rule.moments.first + rule.moments.second


@pytest.mark.parametrize("params", [[], [{"params": []}]])
def test_one_without_parameters_cannot_be_tried(params):
    optimizer = OtherAdam([nn.Parameter(torch.zeros(2))])
    optimizer.param_groups = params
    with pytest.raises(ValueError, match=r"OtherAdam cannot follow .* its groups hold no parameters\."):
        rule_of(optimizer)
