"""A switch needs memory for one layer at a time."""

import weakref

import pytest
import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import Adapter, Conversion, Dense, Factored, convert, prepare, trainable_weights


@pytest.mark.parametrize("moments", ["reset", "project"])
@pytest.mark.parametrize("first", ["factored", "adapter"])
def test_each_old_layer_is_free_before_the_next_weight_is_formed(monkeypatch, first, moments):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=f"{first}@0 dense@1", rank_multiple=4, moments=moments), 2)
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    layers = [trainable_weights(model.get_submodule(name)) for name in drt.targets]
    kept = [
        [weakref.ref(p) for p in pair] + [weakref.ref(optimizer.state[p]["exp_avg"]) for p in pair] for pair in layers
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
