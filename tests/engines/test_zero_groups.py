"""The optimizer that DeepSpeed trains beside the one that everybody knows, without processes."""

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
from hf_drt.engines import parts_of_zero
from hf_drt.optim import step_scales, unwrap

OUTER = "drt_outer"


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2,), float(i))) for i in range(count)]


def outer_of(old, new, decayed) -> torch.optim.AdamW:
    groups = [{"params": [old, new], "lr": 0.1}, {"params": [], "lr": 0.2}, {"params": [decayed], "lr": 0.3}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def test_weights_of_other_ages_stand_apart_and_empty_groups_are_left_out():
    old, new, decayed = parameters(3)
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    outer = outer_of(old, new, decayed)
    outer.param_groups[0]["params"].append(frozen)
    ages = {old: 7.0, new: 0.0, decayed: 7.0}
    groups = parts_of_zero().inner_groups(outer.param_groups, ages.__getitem__, {"bias_correction": True})
    assert [(g[OUTER], [id(p) for p in g["params"]]) for g in groups] == [
        (0, [id(new)]),
        (0, [id(old)]),
        (2, [id(decayed)]),
    ]
    assert [g["lr"] for g in groups] == [0.1, 0.1, 0.3]
    assert all(g["bias_correction"] for g in groups)  # what the inner optimizer's class has beside the outer one's


class Zero:
    """Of DeepSpeed's optimizer what is asked here."""

    def __init__(self, inner):
        self.optimizer = inner


@pytest.mark.parametrize("rate", [0.1, 0.05])
def test_a_step_is_that_of_one_optimizer_and_goes_by_the_outer_rates(rate):
    """Against one AdamW over the same parameters; the re-warm-up's share is 1 here, the form's multiplier 0.5."""
    zero, ours, theirs = parts_of_zero(), parameters(3), parameters(3)
    outer, expected = outer_of(*ours), outer_of(*theirs)
    outer.param_groups[0]["drt_lr_scale"] = 0.5
    inner = zero.inner_optimizer(outer, zero.inner_groups(outer.param_groups, lambda p: 0.0, outer.defaults))
    assert (type(inner), inner.state, inner is outer) == (torch.optim.AdamW, {}, False)
    stands = zero.Regrouped(outer, step_scales)
    stands.attach(Zero(inner))
    outer.param_groups[0]["lr"], expected.param_groups[0]["lr"] = rate, rate / 2
    for _ in range(3):
        for parameter in (*ours, *theirs):
            parameter.grad = torch.ones(2)
        inner.step()
        expected.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert stands.param_groups[0]["lr"] == rate


def test_it_is_unwrapped_to_the_outer_one():
    outer = outer_of(*parameters(3))
    assert unwrap(parts_of_zero().Regrouped(outer, step_scales)) is outer
