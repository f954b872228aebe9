"""What the matrix optimizer takes, in bytes and FLOPs: the estimate against real updates."""

import sys

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_drt import Adapter, Dense, DRTConfig, DynamicRank, Factored
from hf_drt.forms import form_of, layer_of, trainable_weights
from hf_drt.planning import update_multiply_adds, update_tokens
from hf_drt.simulate import batch_spec, estimate_run, optimizer_bytes, simulate_step

MODELS = {**tiny.MODELS, "mixtral": tiny.mixtral, "resnet": tiny.resnet}
SCHEDULES = ["dense@0", "factored:4@0", "adapter:4@0"]


def controlled(model, schedule, **settings):
    drt = DynamicRank(model, DRTConfig(schedule=schedule, matrix_optimizer="muon", **settings), max_steps=10)
    drt.apply(0)
    return drt


def with_gradients(kind, schedule, dtype=torch.float32, make=torch.optim.AdamW, model=None):
    """A controller, its optimizer, and made-up gradients of all trainable weights."""
    drt = controlled((model or MODELS[kind]()).to(dtype), schedule)
    optimizer = make([p for p in drt.model.parameters() if p.requires_grad], lr=1e-3)
    drt.install(optimizer)
    for p in drt.model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    return drt, optimizer


def layers_of(drt):
    return [layer_of(drt.model, name) for name in drt.targets]


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_state_is_that_after_a_real_step(kind, schedule):
    drt, optimizer = with_gradients(kind, schedule)
    optimizer.step()
    real = bytes_of(value for state in optimizer.state.values() for value in state.values())
    estimate, _ = optimizer_bytes("adamw_torch", drt.model.parameters(), layers_of(drt))
    assert estimate == real
    assert estimate < optimizer_bytes("adamw_torch", drt.model.parameters())[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_momentum_is_the_state_of_a_matrix_and_has_its_dtype(dtype):
    """Beside it stands a zero that AdamW looks for as it is loaded."""
    drt, _ = with_gradients("llama", "factored:4@0", dtype)
    trained = [w for layer in layers_of(drt) for w in trainable_weights(layer)]
    assert optimizer_bytes("adamw_torch", trained, layers_of(drt))[0] == bytes_of(trained) + 4 * len(trained)
    two_moments_and_a_count = optimizer_bytes("adamw_torch", trained)[0]
    assert two_moments_and_a_count == 2 * bytes_of(trained) + 4 * len(trained)


@pytest.mark.parametrize("schedule", ["dense@0", "factored:4@0"])
def test_frozen_layers_take_nothing(schedule):
    model = tiny.llama()
    model.model.layers[0].requires_grad_(False)
    drt = controlled(model, schedule, exclude=[r"layers\.0\."])
    frozen = [model.model.layers[0].mlp.up_proj]
    layers = layers_of(drt)
    assert optimizer_bytes("sgd", model.parameters(), [*layers, *frozen]) == optimizer_bytes(
        "sgd", model.parameters(), layers
    )


def allocated(work):
    """The most that is alive at a time in some work, beyond what was before: the allocator's record of every
    allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["dense@0", "factored:12@0", "adapter:12@0"])
def test_peak_of_a_step_is_that_of_the_allocator(schedule, dtype):
    """In the second step, of all layers."""
    D, F = 256, 512
    model = tiny.llama(hidden_size=D, intermediate_size=F, num_hidden_layers=1)
    drt, optimizer = with_gradients("llama", schedule, dtype, torch.optim.SGD, model)
    optimizer.step()
    _, scratch = optimizer_bytes("sgd", model.parameters(), layers_of(drt))
    with torch.backends.mkldnn.flags(enabled=False):
        assert scratch == pytest.approx(allocated(optimizer.step), rel=0.01)
    # oneDNN's products in bfloat16 copy their operands, which a step without data does not see.
    assert 0.99 * scratch <= allocated(optimizer.step) <= scratch + 2 * (2 * D * F)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_multiply_adds_are_those_torch_counts_in_a_real_step(kind, schedule, steps, monkeypatch):
    """With any number of Newton-Schulz steps."""
    if steps is not None:
        monkeypatch.setattr(sys.modules["hf_drt.linalg.polar"], "STEPS", steps)
        monkeypatch.setattr(sys.modules["hf_drt.planning.update_cost"], "POLAR_STEPS", steps)
    drt, optimizer = with_gradients(kind, schedule)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    expected = 0
    for name, shape in drt.targets.items():
        form = form_of(layer_of(drt.model, name))
        # Which torch does not count: of either factor two Cholesky decompositions and a triangular inverse.
        decomposed = 0 if form == Dense() else 5 * form.rank**3 // 3
        expected += drt.copies[name][0] * (update_multiply_adds(form, shape) - decomposed)
    assert counter.get_total_flops() == 2 * expected > 0


def test_tokens_of_an_update():
    d, r, m, n = 768, 96, 2048, 768
    assert update_tokens([(d, d)], [Dense()]) == pytest.approx(5 * d)
    assert update_tokens([(m, n)], [Dense()]) == pytest.approx(5 / 3 * (2 * n + n**2 / m))
    factors = 4 / 3 * r + 113 / 9 * r**2 / (m + n)
    assert update_tokens([(m, n)], [Factored(r)]) == pytest.approx(factors)
    trained = 3 * r * (m + n)
    assert update_tokens([(m, n)], [Adapter(r)]) == pytest.approx(factors * trained / (trained + 2 * m * n))
    # Of eight experts a token meets two, and all are updated.
    assert update_tokens([(m, n)], [Factored(r)], [(8, 2)]) == pytest.approx(4 * factors)


# ---- runs


def test_phases_of_a_run():
    with torch.device("meta"):
        model = tiny.llama()
    config = DRTConfig(schedule="factored:4@0 dense@30% adapter:4@60%", matrix_optimizer="muon")
    drt = DynamicRank(model, config, max_steps=100)
    run = estimate_run(drt, batch_spec(model, 2, 8), optimizer="adamw_torch")
    for index, phase in enumerate(run.phases):
        real, optimizer = with_gradients("llama", SCHEDULES[(1, 0, 2)[index]])
        optimizer.step()
        state = bytes_of(value for state in optimizer.state.values() for value in state.values())
        assert phase.step.optimizer == state
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert phase.update_flops == pytest.approx(counter.get_total_flops(), rel=0.04)
        assert phase.step.peak >= phase.step.weights + phase.step.gradients + state
        assert real.plan.phases[0].kind == phase.kind
    assert run.dense == run.phases[1].step
    assert run.switch_extra == 64 * 32 * (4 + 4 + 4)  # weight, gradient and momentum
    plain = estimate_run(DynamicRank(model, DRTConfig(schedule=str(drt.plan)), plan=drt.plan), batch_spec(model, 2, 8))
    assert [p.update_flops for p in plain.phases] == [0, 0, 0]
    assert [p.step.flops for p in plain.phases] == [p.step.flops for p in run.phases]
    assert all(a.step.optimizer < b.step.optimizer for a, b in zip(run.phases, plain.phases, strict=True))


def test_the_update_is_part_of_the_peak():
    """Little is kept of one short sample, so that the peak is that of the update: of one layer's copies."""
    with torch.device("meta"):
        model = tiny.llama(hidden_size=256, intermediate_size=512)
    names = list(DynamicRank(model, DRTConfig(schedule="dense@0"), max_steps=1).targets)
    cost = simulate_step(model, batch_spec(model, 1, 2), optimizer="sgd", matrices=names)
    layers = [layer_of(model, name) for name in names]
    state, scratch = optimizer_bytes("sgd", model.parameters(), layers)
    assert cost.optimizer == state == 4 * sum(layer.weight.numel() + 1 for layer in layers)  # and a zero of each
    assert cost.peak == state + cost.weights + cost.gradients + scratch
    assert all(p.is_meta for p in model.parameters())
