"""A switch needs memory for one layer at a time."""

import weakref

import pytest
import tiny
import torch
from schedulefree import AdamWScheduleFree

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import Adapter, Conversion, Dense, Factored, convert, prepare, trainable_weights
from hf_drt.transition import HalfwayError


@pytest.mark.parametrize("moments", ["reset", "project"])
@pytest.mark.parametrize("first", ["factored", "adapter"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamWScheduleFree])
def test_each_old_layer_is_free_before_the_next_weight_is_formed(monkeypatch, kind, first, moments):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=f"{first}@0 dense@1", rank_multiple=4, moments=moments), 2)
    drt.apply(0)
    optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    getattr(optimizer, "train", lambda: None)()
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    layers = [trainable_weights(model.get_submodule(name)) for name in drt.targets]
    kept = [
        [weakref.ref(p) for p in pair] + [weakref.ref(optimizer.state[p]["exp_avg_sq"]) for p in pair]
        for pair in layers
    ]
    del layers
    alive, commit = [], Conversion.commit

    def counted(conversion):
        alive.append(sum(any(ref() is not None for ref in refs) for refs in kept))
        return commit(conversion)

    monkeypatch.setattr(Conversion, "commit", counted)
    drt.begin_step(1, optimizer)
    assert alive == list(range(len(kept), 0, -1))
    assert all(ref() is None for refs in kept for ref in refs)


def test_a_weight_is_not_formed_before_the_commit():
    """Neither the dense W behind factors nor a merged base: of a whole model they would be a second copy."""
    linear = torch.nn.Linear(16, 12)
    factored = convert(linear, Factored(4)).module
    inflated = prepare(factored, Dense())
    assert inflated.module.weight.numel() == 0
    assert inflated.commit().weight.shape == (12, 16)
    adapter = convert(inflated.module, Adapter(4)).module
    torch.nn.init.normal_(adapter.lora_B)
    before, W = adapter.base.clone(), adapter.matrix().detach()
    merged = prepare(adapter, Dense())
    assert torch.equal(adapter.base, before)
    assert torch.allclose(merged.commit().weight, W, atol=1e-6)


def trained_once(schedule: str) -> tuple[torch.nn.Module, DynamicRank, torch.optim.Optimizer]:
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=schedule, rank_multiple=4), 4)
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    drt.begin_step(0, optimizer)
    return model, drt, optimizer


def test_memory_that_runs_out_halfway_is_no_ordinary_error_and_the_model_is_not_used_again(monkeypatch):
    _, drt, optimizer = trained_once("factored@0 dense@2")
    commits, commit = [], Conversion.commit

    def failing(conversion):
        commits.append(conversion)
        if len(commits) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return commit(conversion)

    monkeypatch.setattr(Conversion, "commit", failing)
    with pytest.raises(HalfwayError, match=r"halfway \(OutOfMemoryError: .*load them again or resume from the last"):
        drt.begin_step(2, optimizer)
    with pytest.raises(ValueError, match=r"has lost its weights in a change of form that failed halfway"):
        drt.begin_step(2, optimizer)


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes():
    model, drt, optimizer = trained_once("dense@0 factored@2")
    name = list(drt.targets)[3]
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"^{name}: weight of a layer .* holds inf or nan"):
        drt.begin_step(2, optimizer)
    assert list(model.modules()) == before
    assert drt.phase == 0


def test_steps_that_begin_anew_in_every_epoch_are_refused():
    _, drt, optimizer = trained_once("factored@0 dense@2")
    drt.begin_step(2, optimizer)
    with pytest.raises(ValueError, match=r"begin_step\(0\) comes after begin_step\(2\)\. Count update steps over the"):
        drt.begin_step(0, optimizer)
