"""Rules of one's own: an optimizer that counts its groups' steps and has moments that follow; one that makes state."""

import pytest
import tiny
import torch
import toys
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from hf_drt import DRTConfig, DynamicRank
from hf_drt.optim import OPTIMIZERS, MomentKeys, OptimizerRule, qualified_name, unwrap

PLAN = "dense@0 factored@3 adapter@6 dense@9"


class Counting(torch.optim.Optimizer):
    """Adam whose bias correction counts the group's steps."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                m, v = (self.state[p].setdefault(name, torch.zeros_like(p)) for name in "mv")
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad**2, 0.001)
                size = (v / (1 - 0.999 ** group["k"])).sqrt() + 1e-8
                p.sub_(m / (1 - 0.9 ** group["k"]) / size, alpha=group["lr"])


@pytest.fixture
def registered():
    """Gives a class a rule."""
    added = []

    def add(cls, rule):
        added.append(qualified_name(cls))
        OPTIMIZERS.add(added[-1], rule)

    yield add
    for name in added:
        OPTIMIZERS.remove(name)


def trained(make, moments, **settings):
    torch.manual_seed(0)
    model = tiny.llama(num_hidden_layers=1).double()
    drt = DynamicRank(model, DRTConfig(schedule=PLAN, rank=8, moments=moments, **settings), max_steps=12)
    drt.apply(0)
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    drt.install(optimizer)
    for k in range(12):
        drt.begin_step(k, optimizer)
        torch.manual_seed(k)
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return drt, optimizer


@pytest.mark.parametrize("moments", ["project", "reset"])
def test_counts_follow_with_moments_and_begin_anew_with_them(registered, moments):
    """As under torch's Adam, which counts the steps of each weight in its state."""
    registered(Counting, OptimizerRule("a toy", MomentKeys(("m",), ("v",)), counts={"k": 0}))
    drt, optimizer = trained(Counting, moments)
    other, adam = trained(lambda params: torch.optim.Adam(params, lr=1e-3, foreach=False), moments)
    for name, p in drt.model.named_parameters():
        usual = other.model.get_parameter(name)
        torch.testing.assert_close(p, usual, rtol=1e-9, atol=1e-12, msg=name)
        count = optimizer.state[p].get("k", optimizer.param_groups[0]["k"])
        assert count == adam.state[usual]["step"]
    assert len(optimizer.param_groups) == 1


def test_of_weights_that_the_matrix_optimizer_trains_the_rule_makes_no_state(registered):
    asked = []
    rule = OptimizerRule("a toy", new_state=lambda optimizer, weight: asked.append(weight) or {})
    registered(toys.Lion, rule)
    trained(toys.Lion, "project", matrix_optimizer="muon")
    assert asked == []
    rule_alone, _ = trained(toys.Lion, "reset")
    assert len(asked) == len(rule_alone.targets) * (2 + 2 + 1)


class Derived(AcceleratedOptimizer):
    pass


@pytest.mark.parametrize("wrap", [AcceleratedOptimizer, Derived, lambda o: Derived(AcceleratedOptimizer(o))])
def test_what_is_derived_from_accelerates_wrapper_is_looked_into_too(wrap):
    Accelerator(cpu=True)  # whose state the wrapper reads
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    assert unwrap(wrap(inner)) is inner
