"""The estimate of a run against arithmetic, torch's own counters on real runs, and real optimizers."""

import re

import pytest
import tiny
import torch
import transformers as T
from schedulefree import AdamWScheduleFree
from torch.utils.flop_counter import FlopCounterMode

from hf_drt import Adapter, Dense, DRTConfig, DynamicRank, Factored, Plan, Run, Schedule, find_targets
from hf_drt.optim import averages, estimated_names, optim_names
from hf_drt.simulate import (
    Layer,
    SimulationError,
    batch_spec,
    estimate_run,
    optimizer_bytes,
    propose,
    simulate_step,
)
from hf_drt.transition.change import empty_forms

ROWS, LENGTH = 2, 8
D, F, L, V = 32, 64, 2, tiny.VOCAB  # of tiny.llama


def on_meta(kind="llama", **changes):
    with torch.device("meta"):
        return tiny.MODELS[kind](**changes)


def put(model, form):
    empty_forms(model, dict.fromkeys(find_targets(model).targets, form))
    return model


def llama_flops(linear):
    """By hand: blocks of 4 d x d and 3 d x f matrices, causal attention counted in full, and the head."""
    tokens = ROWS * LENGTH
    block = 4 * linear(D, D) + 2 * linear(F, D) + linear(D, F)
    # Q K^T and P V forward; fused attention forms the scores once more in its backward pass, so five products there.
    attention = 7 * 2 * ROWS * LENGTH**2 * D
    return tokens * (L * block + 6 * V * D) + L * attention


@pytest.mark.parametrize(
    ("form", "linear"),
    [
        (Dense(), lambda m, n: 6 * m * n),
        (Factored(4), lambda m, n: 6 * 4 * (m + n)),
        (Adapter(4), lambda m, n: 4 * m * n + 6 * 4 * (m + n)),
    ],
)
def test_flops_of_a_llama_are_those_by_hand(form, linear):
    model = put(on_meta(), form)
    cost = simulate_step(model, batch_spec(model, ROWS, LENGTH))
    assert cost.flops == llama_flops(linear)


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_flops_are_those_torch_counts_in_a_real_step(kind):
    real, meta = tiny.MODELS[kind](), on_meta(kind)
    for model in (real, meta):
        model.set_attn_implementation("eager")  # torch does not count fused attention on a CPU
        names = list(find_targets(model).targets)
        empty_forms(model, {name: [Factored(4), Adapter(4)][i % 2] for i, name in enumerate(names) if i % 3})
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False) as counter:
        real.train()(**tiny.batch(kind, ROWS)).loss.backward()
    assert simulate_step(meta, batch_spec(meta, ROWS, tiny.LENGTH)).flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5"])
@pytest.mark.parametrize("form", [Dense(), Factored(4), Adapter(4)], ids=str)
def test_peak_is_that_of_the_allocator_in_a_real_step(kind, form):
    """Forward and backward: the allocator's own record of every allocation."""
    real, meta = put(tiny.MODELS[kind](), form), put(on_meta(kind), form)
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch = tiny.batch(kind, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        real.train()(**batch).loss.backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    cost = simulate_step(meta, batch_spec(meta, 16, tiny.LENGTH), optimizer="sgd")
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    assert cost.peak - cost.weights == pytest.approx(peak + inputs, rel=0.01)


def test_parts_of_the_memory():
    model = on_meta()
    cost = simulate_step(model, batch_spec(model, ROWS, LENGTH), optimizer="adamw_torch_fused")
    numbers = sum(p.numel() for p in model.parameters())
    assert cost.parameters == cost.trainable == numbers
    assert cost.gradients == 4 * numbers
    assert cost.weights == 4 * (numbers + sum(b.numel() for b in model.buffers()))
    assert cost.peak >= cost.weights + cost.optimizer + cost.gradients
    assert cost.activations > 4 * ROWS * LENGTH * V  # the logits alone


@pytest.mark.parametrize("name", estimated_names())
def test_optimizer_state_is_that_of_the_real_optimizer(name):
    """Matrices of 4,096 elements and more may be kept in few bits, in codes whose table is the same for all."""
    model = tiny.llama(hidden_size=128)
    args = T.TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to=[])
    cls, options = T.Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = cls(model.parameters(), **options)
    getattr(optimizer, "train", lambda: None)()
    model(**tiny.batch(rows=2)).loss.backward()
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    held = [v for state in optimizer.state.values() for key, v in state.items() if not key.startswith("qmap")]
    real = sum(t.numel() * t.element_size() for v in held if torch.is_tensor(v) for t in parts(v))
    assert optimizer_bytes(name, model.parameters())[0] == pytest.approx(real, rel=1e-3)


def parts(tensor):
    """The tensors inside of one that is a class of its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def test_an_estimate_leaves_the_codes_of_a_library_as_they_are():
    """torchao computes its tables once for a process: the first may be asked for where tensors have no data."""
    from torchao.optim import subclass_8bit

    subclass_8bit.get_qmap_signed.cache_clear()
    optimizer_bytes("adamw_torch_8bit", [torch.nn.Parameter(torch.zeros(64, 64))])
    table = torch.tensor(subclass_8bit.get_qmap_signed())
    subclass_8bit.get_qmap_signed.cache_clear()
    assert torch.equal(table, torch.tensor(subclass_8bit.get_qmap_signed()))
    assert len(table.unique()) == 256


def test_temporaries_of_a_compiled_step_are_not_counted():
    assert optimizer_bytes("adamw_torch_8bit", [torch.nn.Parameter(torch.zeros(64, 64))])[1] == 0


def test_frozen_parameters_have_no_state():
    model = tiny.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert optimizer_bytes("adamw_torch", model.parameters())[0] == pytest.approx(8 * trained, rel=1e-2)


@pytest.mark.parametrize("name", sorted(optim_names().keys() - estimated_names().keys()))
def test_an_optimizer_whose_own_step_does_not_show_its_memory_is_refused(name):
    with pytest.raises(ValueError, match=f"the memory of '{name}' cannot be estimated: .* Measure it in a short run"):
        optimizer_bytes(name, [])


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"'lion' is not an optimizer of known state\. Of the \d+ that can, lion_"):
        optimizer_bytes("lion", [])


def test_accumulation_multiplies_flops_and_keeps_gradients():
    model = on_meta()
    one, two, five = (
        simulate_step(model, batch_spec(model, ROWS, LENGTH), accumulation=n, watch=["model.layers.0.mlp.up_proj"])
        for n in (1, 2, 5)
    )
    assert (two.flops, five.flops) == (2 * one.flops, 5 * one.flops)
    for cost, times in ((one, 1), (two, 2), (five, 5)):
        assert cost.rows == {"model.layers.0.mlp.up_proj": times * ROWS * LENGTH}
    assert one.peak < two.peak == five.peak


def test_checkpointing_takes_time_and_saves_memory():
    plain, checkpointed = on_meta(num_hidden_layers=4), on_meta(num_hidden_layers=4)
    checkpointed.activation_checkpointing_enable()
    watch = ["model.layers.3.mlp.up_proj"]
    a, b = (simulate_step(model, batch_spec(model, 16, LENGTH), watch=watch) for model in (plain, checkpointed))
    assert b.flops > a.flops
    assert b.activations < a.activations / 2
    assert b.rows == a.rows


def test_the_model_is_left_as_it_was():
    model = on_meta().eval()
    parameters = dict(model.named_parameters())
    simulate_step(model, batch_spec(model, ROWS, LENGTH), watch=["model.layers.0.mlp.up_proj"])
    assert all(parameters[name] is p and p.is_meta and p.grad is None for name, p in model.named_parameters())
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_that_looks_at_values_is_refused():
    model = on_meta()

    def look(module, args):
        if args[0].sum().item() > 0:
            raise AssertionError

    model.model.norm.register_forward_pre_hook(look)
    with pytest.raises(SimulationError, match="the cost of LlamaForCausalLM does not follow from its shapes"):
        simulate_step(model, batch_spec(model, ROWS, LENGTH))
    assert all(p.is_meta for p in model.parameters())


# ---- batches


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_batch_is_one_that_the_model_takes(kind):
    model = tiny.MODELS[kind]()
    batch = batch_spec(model, 3, LENGTH).random(torch.Generator().manual_seed(0))
    assert torch.isfinite(model(**batch).loss)
    inputs = batch_spec(model, 3, LENGTH, labels=False).random(torch.Generator().manual_seed(0))
    assert model(**inputs).logits.shape[0] == 3


def test_batches_that_cannot_be_made():
    with pytest.raises(ValueError, match="sequences of 4000 tokens exceed the 2048 positions of LlamaForCausalLM"):
        batch_spec(on_meta(), 1, 4000)
    with pytest.raises(ValueError, match="LlamaModel has no loss that is known here"):
        batch_spec(on_meta().model, 1, 8)
    model = on_meta()
    model.main_input_name = "bbox"
    with pytest.raises(ValueError, match="LlamaForCausalLM takes 'bbox', and batches can be made of input_ids"):
        batch_spec(model, 1, 8)


# ---- runs


def controller(schedule, steps=100, **settings):
    if schedule != "factored:3@0":
        settings["rank_multiple"] = 4
    return DynamicRank(on_meta(), DRTConfig(schedule=schedule, **settings), max_steps=steps)


@pytest.mark.parametrize("schedule", ["factored@0 dense@30% adapter@60% factored@80%", "decay", "factored:3@0"])
def test_share_of_the_run_follows_from_that_of_its_layers(schedule):
    drt = controller(schedule)
    run = estimate_run(drt, batch_spec(drt.model, ROWS, LENGTH))
    target = 6 * ROWS * LENGTH * sum(out * into for out, into in drt.targets.values()) / run.dense.flops
    assert run.share == pytest.approx(1 - target + target * drt.cost().flops)
    assert run.flops == sum(phase.steps * phase.step.flops for phase in run.phases)
    assert all(layer.rows == ROWS * LENGTH for layer in run.layers)


def test_phases_of_a_run():
    drt = controller("factored@0 dense@30% adapter@60%")
    run = estimate_run(drt, batch_spec(drt.model, ROWS, LENGTH))
    assert [(p.kind, p.start, p.end, p.ranks) for p in run.phases] == [
        ("factored", 0, 30, (8, 8)), ("dense", 30, 60, None), ("adapter", 60, 100, (8, 8)),
    ]  # fmt: skip
    assert run.phases[1].step == run.dense
    # An adapter's optimizer state is that of factors; its weights are more than dense.
    assert run.phases[2].step.optimizer == run.phases[0].step.optimizer < run.dense.optimizer
    assert run.phases[2].step.weights > run.dense.weights > run.phases[0].step.weights
    assert run.switch_extra == 64 * 32 * 16  # weight, gradient and two moments
    assert all(p.is_meta for p in drt.model.parameters())


@pytest.mark.parametrize("plan", ["dense@0 factored@30%", "factored@0 dense@30%", "factored@0 adapter@50%"])
def test_a_switch_at_averages_takes_a_copy_of_all_weights_that_change(plan, monkeypatch):
    """Against the copies of a real switch."""
    drt, kept, copied = controller(plan), [], averages._copied
    run = estimate_run(drt, batch_spec(drt.model, ROWS, LENGTH), optimizer="schedule_free_adamw")
    real = DynamicRank(tiny.llama(), drt.config, max_steps=100)
    real.apply(0)
    optimizer = AdamWScheduleFree((p for p in real.model.parameters() if p.requires_grad), lr=1e-3)
    monkeypatch.setattr(averages, "_copied", lambda weights: kept.extend(map(sizes, weights)) or copied(weights))
    real.begin_step(real.plan.phases[1].start, optimizer)
    one_layer = 64 * 32 * 16  # weight, gradient and two moments
    assert run.switch_extra - one_layer == sum(kept) > one_layer


def sizes(weight):
    return weight.numel() * weight.element_size()


def test_warnings_name_layers_and_break_even():
    drt = controller("factored@0 dense@30% adapter@60%", rank_pattern={"mlp": 20, "q_proj": 16, "k_proj": 15})
    warnings = "\n".join(estimate_run(drt, batch_spec(drt.model, ROWS, LENGTH)).warnings)
    for pattern in (
        r"phase 0 \(factored\): 2 layers \(e.g. \S+\.0\.self_attn\.q_proj, 32 x 32, break-even 16\) stay dense",
        r"phase 0 \(factored\): 8 layers .*save less than a tenth: near break-even",
        r"phase 2 \(adapter\): 12 layers .*cost more FLOPs than dense \(up to x 1.60\)",
    ):
        assert re.search(pattern, warnings), (pattern, warnings)


@pytest.mark.slow
def test_seventy_billion_parameters_take_seconds_and_no_memory():
    import resource
    import time

    config = T.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = T.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    drt = DynamicRank(model, DRTConfig(schedule="paper"), max_steps=1000)
    run = estimate_run(drt, batch_spec(model, 1, 4096))
    assert run.dense.parameters == pytest.approx(70.55e9, rel=1e-3)
    # 6 FLOPs per weight and token, embeddings aside, and attention.
    linear = 6 * 4096 * (run.dense.parameters - 128256 * 8192)
    assert run.dense.flops == pytest.approx(linear + 80 * 14 * 4096**2 * 8192, rel=1e-3)
    assert time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB


# ---- proposals


def proposed(budget, schedule, steps=1000, **settings):
    drt = controller(schedule, steps, **settings)
    reference = estimate_run(drt, batch_spec(drt.model, ROWS, LENGTH))
    layers = [Layer(layer.name, layer.shape, layer.rows) for layer in reference.layers]
    return drt, propose(budget, drt.plan, layers, reference.dense.flops, drt.config)


def simulated_share(drt, plan, ratio):
    config = DRTConfig(rank_ratio=ratio, rank_multiple=drt.config.rank_multiple)
    other = DynamicRank(on_meta(), config, plan=plan)
    return estimate_run(other, batch_spec(other.model, ROWS, LENGTH)).share


def test_a_proposal_keeps_the_windows_and_takes_the_largest_rank():
    drt, proposal = proposed(0.8, "factored@0 dense@30% factored@60%")
    assert proposal.plan == drt.plan
    assert proposal.share <= 0.8
    assert proposal.share == pytest.approx(simulated_share(drt, proposal.plan, proposal.rank_ratio))
    assert simulated_share(drt, drt.plan, proposal.rank_ratio + 1 / 128) > 0.8


def test_a_tight_budget_cuts_dense_windows_short():
    drt, proposal = proposed(0.55, "factored@0 dense@30% factored@80%")
    assert proposal.rank_ratio == 1 / 32
    assert proposal.share <= 0.55
    assert proposal.share == pytest.approx(simulated_share(drt, proposal.plan, proposal.rank_ratio))
    (_, window, last) = proposal.plan.phases
    assert window.start == 300
    assert 300 < last.start < 800
    longer = Plan((*proposal.plan.phases[:2], type(last)(last.start + 10, last.kind)), 1000)
    assert simulated_share(drt, longer, 1 / 32) > 0.55


def test_a_last_dense_window_begins_later():
    _, proposal = proposed(0.55, "factored@0 dense@30%")
    assert proposal.plan.phases[1].start > 300
    assert proposal.share <= 0.55


def test_budgets_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\), got 1.5"):
        proposed(1.5, "factored@0")
    with pytest.raises(ValueError, match=r"a budget of 0.1 cannot be reached: .* the run still takes 0\.\d+ of"):
        proposed(0.1, "factored@0 dense@30% adapter@60%")
    with pytest.raises(
        ValueError, match=r"a budget of 0.1 cannot be reached: with the ranks that the schedule gives and"
    ):
        proposed(0.1, "factored:0.125@0 dense@30% adapter:0.125@60%")
    plan = Schedule.parse("dense@0").resolve(Run(10))
    with pytest.raises(ValueError, match="the plan is dense throughout: there is no rank to choose"):
        propose(0.5, plan, [], 1.0, DRTConfig())
