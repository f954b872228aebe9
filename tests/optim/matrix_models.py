"""Models under the matrix optimizer, and loops for them."""

import tiny
import torch
from torch import Tensor, nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.optim.matrices import MATRIX

STEPS = 12
Q = "model.layers.0.self_attn.q_proj"
# The form of the first phase is the one that is tested.
FORMS = ["dense@0 factored@9", "factored@0 dense@9", "adapter@0 dense@9"]
SETTINGS = {"matrix_optimizer": "muon", "matrix_lr": 0.03, "matrix_momentum": 0.9}


def controller(model: nn.Module, schedule: str, steps: int = STEPS, **changes) -> DynamicRank:
    """In the first phase; settings of adapters where the schedule has one."""
    used = {key: value for key, value in changes.items() if "adapter" in schedule or not key.startswith("adapter_")}
    drt = DynamicRank(model, DRTConfig(schedule=schedule, **{"rank": 4} | SETTINGS | used), steps)
    drt.apply(0)
    return drt


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, **changes) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model), **{"lr": 1e-2, "weight_decay": 0.1} | changes)


def backward(model: nn.Module, kind: str = "llama") -> None:
    torch.manual_seed(0)  # of dropout
    model(**tiny.batch(kind)).loss.backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "llama") -> None:
    backward(model, kind)
    optimizer.step()
    optimizer.zero_grad()


def loop(drt: DynamicRank, optimizer: torch.optim.Optimizer, start: int = 0, end: int = STEPS) -> None:
    for k in range(start, end):
        drt.begin_step(k, optimizer)
        step(drt.model, optimizer)


def matrix_group(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if MATRIX in g and any(p is weight for p in g["params"]))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_tree(found, expected) -> None:
    """Two state dicts, bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_tree(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """But for moments of 0, which a fused optimizer makes before it looks for inf."""
    state = [v for of in optimizer.state.values() for v in of.values() if v.any()]
    return [list(model.state_dict().values()), state, [group["lr"] for group in optimizer.param_groups]]


def ramp(k: int) -> float:
    """A schedule's multiplier."""
    return min((k + 1) / 3, 1.0) * (1 - k / 20)
