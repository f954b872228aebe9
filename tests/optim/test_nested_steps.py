"""A class whose ``step`` calls ``super().step()``: what stands around a step does so once, wrapped twice or not."""

import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank

STEPS = 4


class Inner(torch.optim.AdamW):
    """A class of which objects are made beside those of the class derived from it."""


class Outer(Inner):
    def step(self, closure=None):
        return super().step(closure)


class Refusing(Inner):
    def step(self, closure=None):
        if self.refuse:
            raise RuntimeError("no")
        return super().step(closure)


@pytest.fixture(autouse=True)
def wrapped_twice():
    """torch hooks a class's step as the first object of it is made."""
    Inner([nn.Parameter(torch.zeros(1))])


def trained(cls, raises_at=None, **settings):
    """All weights after some updates, of which one is made again after it has raised."""
    torch.manual_seed(0)
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=8, **settings), max_steps=STEPS)
    drt.apply(0)
    optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.refuse = False
    for step in range(STEPS):
        drt.begin_step(step, optimizer)
        torch.manual_seed(step)
        model(**tiny.batch()).loss.backward()
        if step == raises_at:
            optimizer.refuse = True
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step()
            optimizer.refuse = False
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {"matrix_optimizer": "muon", "factored_lr_scale": 0.5, "rewarmup_steps": 2},
        {"frobenius_decay": True, "factored_lr_scale": 3.0},
        {"left_lr_scale": 2.0, "rewarmup_steps": 2},
    ],
    ids=["muon", "frobenius", "scales"],
)
def test_a_step_within_a_step_changes_nothing(settings):
    assert all(map(torch.equal, trained(Outer, **settings), trained(torch.optim.AdamW, **settings)))


def test_a_step_that_has_raised_is_no_step_around_the_next():
    settings = {"matrix_optimizer": "muon", "rewarmup_steps": 2}
    assert all(map(torch.equal, trained(Refusing, raises_at=3, **settings), trained(Inner, **settings)))
