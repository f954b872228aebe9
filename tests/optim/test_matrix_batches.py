"""Pairs of factors of equal shapes are updated together, and as each would be alone."""

import pytest
import tiny
import torch
from matrix_models import FORMS, adamw, backward, controller

from hf_drt.optim import matrices


def after_two_steps(schedule: str, **config: object) -> torch.nn.Module:
    model = tiny.llama()
    drt = controller(model, schedule, **config)
    optimizer = adamw(model)
    for k in range(2):
        drt.begin_step(k, optimizer)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def sizes(monkeypatch):
    """How many layers each call has updated."""
    seen = []
    inner = matrices._steps

    def counted(optimizer, batch, scale):
        seen.append(len(batch))
        return inner(optimizer, batch, scale)

    monkeypatch.setattr(matrices, "_steps", counted)
    return seen


@pytest.mark.parametrize(
    ("schedule", "config"),
    [("factored@0 dense@9", {}), ("adapter@0 dense@9", {"adapter_init": "principal"}),
     ("factored@0 dense@9", {"rank_pattern": {"v_proj": 2, "down": 3}})],
    ids=["factored", "adapter", "of several ranks"],
)  # fmt: skip
def test_layers_together_move_as_each_would_alone(schedule, config, sizes, monkeypatch):
    together = after_two_steps(schedule, **config)
    batches = sizes.copy()
    monkeypatch.setattr(matrices, "STACKED", 1)
    sizes.clear()
    alone = after_two_steps(schedule, **config)
    assert max(batches) > 1
    assert set(sizes) == {1}
    assert sum(batches) == sum(sizes)  # none is left out, none is met twice
    for (name, one), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        # A step is of the order of 1e-2; what rounding does to it, small singular values of the momentum magnify.
        assert torch.allclose(one, other, rtol=0.0, atol=1e-4), name


def test_dense_weights_are_updated_one_by_one(sizes):
    after_two_steps("dense@0 factored@9")
    assert set(sizes) == {1}


def test_a_batch_has_no_more_entries_than_it_may(monkeypatch):
    found = []
    inner = matrices.pair_update

    def counted(L, R, *rest):
        found.append((L.numel() + R.numel(), L.ndim))
        return inner(L, R, *rest)

    monkeypatch.setattr(matrices, "pair_update", counted)
    after_two_steps("factored@0 dense@9")
    largest = max(entries for entries, _ in found)
    found.clear()
    monkeypatch.setattr(matrices, "STACKED", largest - 1)
    after_two_steps("factored@0 dense@9")
    assert max(entries for entries, _ in found) < largest
    assert any(ndim == 3 for _, ndim in found)


@pytest.mark.parametrize("schedule", FORMS)
def test_the_same_layers_give_the_same_bits(schedule):
    first, second = (after_two_steps(schedule, adapter_init="principal") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
