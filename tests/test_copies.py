"""A DynamicRank that is copied, by pickle or deepcopy, with its model and optimizer goes on to the same bits."""

import copy
import pickle

import pytest
import tiny
import torch

from hf_drt import Dense, DRTConfig, DynamicRank, form_of

STEPS = 12
SCHEDULES = {
    "phases": {"schedule": "factored@0 dense@3 adapter@6 factored@9"},
    "step rules": {
        "schedule": "factored@0 dense@3 adapter@6 factored@9", "rewarmup_steps": 2, "factored_lr_scale": 0.5,
        "frobenius_decay": True,
    },
    "matrix optimizer": {"schedule": "factored@0 dense@3 adapter@6 factored@9", "matrix_optimizer": "muon"},
    "trigger": {"schedule": "adaptive(signal=loss,plateau=50,window=15,every=10)", "budget": 0.9},
}  # fmt: skip
WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


def begun(**settings) -> tuple[DynamicRank, torch.optim.Optimizer]:
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(rank=4, **settings), STEPS)
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return drt, optimizer


def go_on(drt: DynamicRank, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    for step in range(start, end):
        drt.begin_step(step, optimizer)
        loss = drt.model(**tiny.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        drt.observe(step + 1, loss.detach())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_copy_goes_on_to_the_same_bits(settings, way):
    drt, optimizer = begun(**settings)
    copies, phases = [], set()
    for step in range(0, STEPS, 2):
        copies.append((step, *way((drt, optimizer))))
        go_on(drt, optimizer, step, step + 2)
        phases.add(drt.phase)
    assert len(phases) > 1
    expected = drt.model.state_dict()
    for step, twin, its_optimizer in copies:
        assert twin.model is not drt.model
        go_on(twin, its_optimizer, step, STEPS)
        found = twin.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert twin.state_dict() == drt.state_dict()
        assert [g["lr"] for g in its_optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_without_the_optimizer_is_a_model_of_its_own(way):
    drt, optimizer = begun(schedule="factored@0 dense@6")
    go_on(drt, optimizer, 0, 2)
    twin = way(drt)
    before = copy.deepcopy(drt.model.state_dict())
    twin.to_dense()
    assert {form_of(m) for m in twin.model.modules()} == {Dense()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in drt.model.state_dict().items())
    go_on(drt, optimizer, 2, 4)


@pytest.mark.parametrize("kind", ["resnet", "mixtral"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_convolutions_and_fused_experts_too(kind, way):
    model = getattr(tiny, kind)()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 adapter@1 dense@2", rank=2), 3)
    for step in range(3):
        drt.apply(step)
        twin = way(drt)
        found = twin.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        assert {name: twin._layer(name).weight.shape for name in twin.targets}
        assert twin.state_dict() == drt.state_dict()
        inputs = tiny.batch("resnet" if kind == "resnet" else "llama")
        assert torch.equal(tiny.logits(twin.model, inputs), tiny.logits(model, inputs))
