"""The estimate of a run knows what blocks keep in each phase: against the allocator, and whole runs."""

import pytest
import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.simulate import batch_spec, estimate_run, simulate_step

ROWS, LENGTH = 16, 8
ROTATION = "factored:4@0 dense[1/2]@10% dense[2/2]+frozen[1/2]@40% frozen@70%"


def on_meta(kind="llama", **changes):
    with torch.device("meta"):
        return tiny.MODELS[kind](**changes)


def estimated(schedule=ROTATION, model=None, rows=ROWS, **settings):
    model = model or on_meta(num_hidden_layers=4)
    controller = DynamicRank(model, DRTConfig(schedule=schedule, **settings), max_steps=100, in_trainer=True)
    return estimate_run(controller, batch_spec(model, rows, LENGTH), optimizer="sgd"), controller


def test_checkpointed_phases_are_those_with_a_trained_dense_layer():
    (plain, _), (saved, _) = estimated(), estimated(dense_checkpointing=True)
    less = [s.step.activations < p.step.activations for s, p in zip(saved.phases, plain.phases, strict=True)]
    assert less == [False, True, True, False]
    assert saved.dense == plain.dense
    assert [p.step.peak <= q.step.peak for p, q in zip(saved.phases, plain.phases, strict=True)] == [True] * 4


def test_a_checkpointed_phase_takes_what_a_checkpointed_run_takes():
    saved, _ = estimated("factored:4@0 dense@50%", dense_checkpointing=True)
    whole = on_meta(num_hidden_layers=4)
    whole.activation_checkpointing_enable()
    expected = simulate_step(whole, batch_spec(whole, ROWS, LENGTH), optimizer="sgd")
    found = saved.phases[1].step
    assert (found.activations, found.peak, found.flops) == (expected.activations, expected.peak, expected.flops)


def test_the_model_is_as_it_was():
    _, controller = estimated(dense_checkpointing=True)
    assert not controller.model.is_activation_checkpointing
    assert controller.is_dense


def real_peak(model, batch):
    """Bytes above the parameters, by the allocator's own record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.train()(**batch).loss.backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in batch.values())


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_the_peak_of_a_checkpointed_phase_is_the_allocators(kind):
    saved, _ = estimated("factored:4@0 dense@50%", on_meta(kind), dense_checkpointing=True)
    real = tiny.MODELS[kind]()
    real.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # a state is 5 kB
    step = saved.phases[1].step
    assert step.peak - step.weights == pytest.approx(real_peak(real, tiny.batch(kind, ROWS)), rel=0.02)


def test_a_model_that_is_checkpointed_as_a_whole_is_refused():
    model = on_meta()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"checkpointed in every phase already\. Turn activation checkpointing"):
        estimated(model=model, dense_checkpointing=True)


# ---- batches in pieces


@pytest.mark.sampled(1)
@pytest.mark.parametrize("pieces", [2, 3, 16, 40])
def test_a_divided_phase_takes_the_memory_of_its_largest_piece_and_the_flops_of_all(pieces):
    saved, _ = estimated(dense_accumulation=pieces)
    plain, _ = estimated()
    for index, divides in enumerate([False, True, True, False]):
        ours, whole = saved.phases[index].step, plain.phases[index].step
        assert ours.flops == pytest.approx(whole.flops, rel=1e-6)
        share = -(-ROWS // pieces) / ROWS if divides else 1
        assert ours.activations == pytest.approx(share * whole.activations, rel=0.05)
        assert (ours.gradients, ours.optimizer, ours.weights) == (whole.gradients, whole.optimizer, whole.weights)
    assert [layer.rows for layer in saved.layers] == [layer.rows for layer in plain.layers]


def test_pieces_are_batches_of_their_own():
    model = on_meta()
    divided = simulate_step(model, batch_spec(model, ROWS, LENGTH), pieces=4)
    accumulated = simulate_step(model, batch_spec(model, ROWS // 4, LENGTH), accumulation=4)
    assert divided == accumulated


def test_all_three_settings_together():
    """The peak of a rotation with all of them is below that with any one, in every phase that one acts in."""
    settings = {"dense_checkpointing": True, "dense_accumulation": 4, "recompute": "bottleneck"}
    together, _ = estimated(**settings)
    for name, value in settings.items():
        alone, _ = estimated(**{name: value})
        assert all(t.step.peak <= a.step.peak for t, a in zip(together.phases, alone.phases, strict=True)), name


def test_a_phase_with_recompute_keeps_what_it_keeps_by_itself():
    saved, _ = estimated("factored:4@0 dense@50%", recompute="bottleneck")
    plain, _ = estimated("factored:4@0 dense@50%")
    assert saved.phases[0].step.activations < 0.6 * plain.phases[0].step.activations
    assert saved.phases[1].step == plain.phases[1].step == plain.dense
