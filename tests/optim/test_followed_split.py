"""An optimizer that is there before packed attention is split."""

import pytest
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def train(net: nn.Module, drt: DynamicRank, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for step in range(4):
        drt.begin_step(step, optimizer)
        torch.manual_seed(step)
        net(torch.randn(2, 3, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("schedule", ["dense@0 factored@2", "factored@0 dense@2"])
@pytest.mark.parametrize("named", [False, True])
def test_it_trains_as_one_that_was_made_afterwards(schedule, named):
    config = DRTConfig(schedule=schedule, rank=4)
    results = []
    for before in (False, True):
        net = model()
        optimizer = torch.optim.AdamW(net.named_parameters() if named else net.parameters(), 1e-2) if before else None
        drt = DynamicRank(net, config, 4)
        optimizer = optimizer or torch.optim.AdamW(net.named_parameters() if named else net.parameters(), 1e-2)
        results.append(train(net, drt, optimizer))
        if named:
            own = {id(p): name for name, p in net.named_parameters()}
            (group,) = optimizer.param_groups
            assert group["param_names"] == [own[id(p)] for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_that_has_made_steps_is_refused():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 16)).sum().backward()
    optimizer.step()
    drt = DynamicRank(net, DRTConfig(schedule="factored@0", rank=4), 4)
    with pytest.raises(ValueError, match=r"made steps with the packed weights of nn\.MultiheadAttention"):
        drt.apply(0, optimizer)
    assert drt.phase is None
