"""Compression of a trained model, against dense linear algebra and against every choice of ranks."""

import copy
import math
import re
from itertools import product

import pytest
import tiny
import torch
from torch import nn

from hf_drt import Adapter, Dense, Factored, convert, dense_state_dict, effective_weight, find_targets, form_of
from hf_drt.compress import compress, plan_compression
from hf_drt.linalg import shrunk
from hf_drt.targets.surgery import Swap, replace

Q = "model.layers.0.self_attn.q_proj"


class Stack(nn.Module):
    """Blocks of two layers, whose singular values fall by given factors."""

    def __init__(self, *layers: tuple[int, int, float]):
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(into, out, bias=False) for out, into, _ in layers]
        self.blocks = nn.ModuleList(nn.ModuleList(linears[i : i + 2]) for i in range(0, len(linears), 2))
        for linear, (out, into, fall) in zip(linears, layers, strict=True):
            U, _, Vh = torch.linalg.svd(torch.randn(out, into, dtype=torch.float64), full_matrices=False)
            linear.weight.data = (U @ torch.diag(3.0 * fall ** torch.arange(min(out, into))).double() @ Vh).float()


def weights(model):
    return {name: effective_weight(module).double().clone() for name, module in find_targets(model).targets.items()}


def tail(W, rank):
    """Squared relative error of the best approximation of this rank."""
    S2 = torch.linalg.svdvals(W) ** 2
    return (S2[rank:].sum() / S2.sum()).item()


def cost(W, rank):
    return min(rank * sum(W.shape), W.numel())


def stored(model):
    """Weights of the target layers, counted where they are."""
    return sum(p.numel() for m in find_targets(model).targets.values() for n, p in m.named_parameters() if n != "bias")


def decaying():
    """A Llama with spectra between flat and steep."""
    model = tiny.llama()
    for index, module in enumerate(find_targets(model).targets.values()):
        U, S, Vh = torch.linalg.svd(module.weight.data, full_matrices=False)
        module.weight.data = (U * S * (0.99 - 0.02 * index) ** torch.arange(len(S))) @ Vh
    return model


# ---- the criteria


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_is_kept_by_the_smallest_rank_that_does(share):
    model = decaying()
    before = weights(model)
    result = compress(model, energy=share, rank_multiple=2)
    assert any(layer.rank for layer in result.layers)
    for layer in result.layers:
        W = before[layer.name]
        enough = next(rank for rank in range(2, 34, 2) if 1 - tail(W, rank) >= share)
        assert layer.rank == (enough if enough * sum(W.shape) < W.numel() else None)
        assert layer.error == pytest.approx(math.sqrt(tail(W, enough)) if layer.rank else 0, abs=1e-6)


def test_an_absolute_rank_is_the_same_for_all_layers_and_break_even_leaves_them_dense():
    result = compress(tiny.llama(), rank=16)  # break-even is 16 for 32 x 32, 21.3 for 64 x 32
    assert {(layer.shape, layer.rank) for layer in result.layers} == {((32, 32), None), ((64, 32), 16), ((32, 64), 16)}


@pytest.mark.parametrize(("ratio", "multiple", "rank"), [(0.25, 4, 8), (0.3, 4, 8), (0.35, 4, 12), (0.01, 4, 4)])
def test_a_ratio_is_of_the_smaller_side_and_rounded_to_the_multiple(ratio, multiple, rank):
    result = plan_compression(tiny.llama(), rank_ratio=ratio, rank_multiple=multiple)
    assert {layer.rank for layer in result.layers} == {rank}


def test_a_ratio_of_one_is_no_rank_of_one():
    with pytest.raises(ValueError, match="rank_ratio=1 leaves all 14 layers as they are"):
        plan_compression(tiny.llama(), rank_ratio=1)


# Steps of equal cost: for 8 x 8 the last one, from 3 to dense, too; for 16 x 8 it is cheaper, so budgets end below it.
BRUTE = {
    "square": ([(8, 8, 0.6), (8, 8, 0.7), (8, 8, 0.5), (8, 8, 0.65)], (0.3, 0.45, 0.6, 0.8, 0.95)),
    "oblong": ([(16, 8, 0.45), (16, 8, 0.3), (8, 16, 0.4), (8, 16, 0.35)], (0.2, 0.3, 0.4, 0.5, 0.6)),
}


@pytest.mark.parametrize(("layers", "shares"), BRUTE.values(), ids=BRUTE)
def test_a_budget_is_shared_out_as_well_as_by_trying_every_choice_of_ranks(layers, shares):
    model = Stack(*layers)
    Ws = list(weights(model).values())
    # Rank 8 of 8 stands for dense: no error, at its cost.
    choices = [[(cost(W, rank), tail(W, rank)) for rank in range(1, 9)] for W in Ws]
    table = [(sum(c for c, _ in choice), sum(e for _, e in choice)) for choice in product(*choices)]
    for share in shares:
        result = plan_compression(model, parameters=share, rank_multiple=1)
        budget = int(share * sum(W.numel() for W in Ws))
        assert result.parameters[1] <= budget
        assert result.squared_error == pytest.approx(min(e for c, e in table if c <= budget), abs=1e-6)


MIXED = [(16, 8, 0.95), (8, 8, 0.6), (16, 16, 0.9), (8, 24, 0.99), (12, 20, 0.8), (24, 8, 0.97)]
UNEVEN = [(16, 16, 0.9), (16, 8, 0.8)]  # taking the best step first ends above a uniform ratio


@pytest.mark.parametrize(("layers", "multiple"), [(MIXED, 1), (MIXED, 2), (UNEVEN, 1)], ids=["mixed", "by 2", "uneven"])
def test_a_budget_is_never_used_worse_than_by_a_uniform_ratio_and_more_never_worse_than_less(layers, multiple):
    model = Stack(*layers)
    Ws = list(weights(model).values())
    dense, last = sum(W.numel() for W in Ws), math.inf
    uniform = []
    for ratio in range(1, 201):
        ranks = [max(multiple, multiple * round(ratio / 200 * min(W.shape) / multiple)) for W in Ws]
        error = sum(tail(W, r) if r * sum(W.shape) < W.numel() else 0 for W, r in zip(Ws, ranks, strict=True))
        uniform.append((sum(map(cost, Ws, ranks)), error))
    least = min(c for c, _ in uniform)
    for budget in range(least, dense, 7):
        result = plan_compression(model, parameters=budget, rank_multiple=multiple)
        assert result.parameters[1] <= budget
        assert result.squared_error <= min(e for c, e in uniform if c <= budget) + 1e-6
        assert result.squared_error <= last + 1e-9
        last = result.squared_error


def test_a_share_and_the_count_it_stands_for_give_the_same():
    share, count = (plan_compression(decaying(), parameters=p, rank_multiple=4) for p in (0.5, 10240))
    assert share.layers == count.layers
    assert share.parameters == (20480, share.parameters[1])
    assert 0.48 < share.flops <= 0.5


def test_a_factor_on_a_weight_does_not_change_how_a_budget_is_shared_out():
    model = decaying()
    plain = plan_compression(model, parameters=0.6, rank_multiple=4)
    model.get_submodule(Q).weight.data *= 100
    scaled = plan_compression(model, parameters=0.6, rank_multiple=4)
    assert [layer.rank for layer in scaled.layers] == [layer.rank for layer in plain.layers]


@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"parameters": 0.5}, {"rank_ratio": 0.3}])
def test_ranks_are_multiples(criterion):
    result = plan_compression(decaying(), rank_multiple=6, **criterion)
    assert {layer.rank % 6 for layer in result.layers if layer.rank} == {0}


# ---- what is done to the model


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_the_model_computes_with_the_truncated_weights_and_can_be_trained_on(kind):
    model, inputs = tiny.MODELS[kind](), tiny.batch(kind)
    before = weights(model)
    total = sum(p.numel() for p in model.parameters())
    result = compress(model, parameters=0.6, rank_multiple=4)
    truncated = tiny.MODELS[kind]()
    for layer in result.layers:
        W = before[layer.name]
        if layer.rank is not None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            W = (U[:, : layer.rank] * S[: layer.rank]) @ Vh[: layer.rank]
        dense = truncated.get_submodule(layer.name)
        dense.weight.data = (W.mT if kind == "gpt2" and not isinstance(dense, nn.Linear) else W).float().contiguous()
        measured = (effective_weight(model.get_submodule(layer.name)) - before[layer.name]).norm()
        assert (measured / before[layer.name].norm()).item() == pytest.approx(layer.error, abs=1e-5)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(truncated, inputs), atol=1e-5, rtol=1e-4)
    assert result.parameters == (stored(truncated), stored(model))
    assert result.model_parameters == (total, sum(p.numel() for p in model.parameters()))
    model(**inputs).loss.backward()
    assert all(p.grad is not None for m in find_targets(model).targets.values() for p in m.parameters())


def in_all_forms():
    """A Llama whose first five layers are factored (ranks 4 and 12), adapters (zero and principal) and oversized."""
    model = decaying()
    forms = [Factored(4), Factored(12), Adapter(4), Adapter(8, 8.0, "principal"), Factored(24)]
    names = list(find_targets(model).targets)[: len(forms)]
    for name, form in zip(names, forms, strict=True):
        layer = model.get_submodule(name)
        replace(model, [Swap(name, layer, convert(layer, form).module)])
        if isinstance(form, Adapter):
            nn.init.normal_(model.get_submodule(name).lora_B, std=0.05)
    return model, names


def test_layers_in_any_form_are_compressed_by_their_effective_weight():
    model, (low, high, zero, principal, oversized) = in_all_forms()
    before = weights(model)
    kept = model.get_submodule(low)
    result = compress(model, rank=8)
    layers = {layer.name: layer for layer in result.layers}
    assert result.parameters[1] == stored(model)
    assert model.get_submodule(low) is kept, "its rank is lower already"
    assert (layers[low].form, layers[low].error, layers[low].parameters) == (Factored(4), 0, (256, 256))
    assert layers[high].parameters == (768, 512)
    assert layers[zero].parameters == (1024 + 256, 512)
    for name in (high, zero, principal, oversized):
        assert form_of(model.get_submodule(name)) == Factored(8)
        error = (effective_weight(model.get_submodule(name)) - before[name]).norm() / before[name].norm()
        assert error.item() == pytest.approx(math.sqrt(tail(before[name], 8)), abs=1e-5)
        assert layers[name].error == pytest.approx(error.item(), abs=1e-5)


def test_adapters_are_merged_and_factors_past_break_even_made_dense_where_no_rank_is_cut():
    model, names = in_all_forms()
    expected = dense_state_dict(model)
    result = compress(model, energy=1.0)
    assert [layer.form for layer in result.layers[:5]] == [Factored(4), Factored(12), Dense(), Dense(), Dense()]
    assert result.parameters[1] == stored(model)
    assert all(layer.error == 0 for layer in result.layers)
    for name in names:
        torch.testing.assert_close(dense_state_dict(model)[f"{name}.weight"], expected[f"{name}.weight"])


def test_a_budget_counts_factored_layers_as_they_are():
    model, names = in_all_forms()
    result = compress(model, parameters=0.5, rank_multiple=4)
    assert stored(model) == result.parameters[1] <= 10240
    assert result.layers[0].form == Factored(4), f"{names[0]} cannot get cheaper"


def test_layers_that_cannot_change_form_are_left_as_they_are():
    model = tiny.llama()
    layers = model.model.layers
    layers[0].self_attn.q_proj.requires_grad_(False)
    layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    layers[1].self_attn.k_proj.weight = layers[1].self_attn.v_proj.weight
    left = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]
    modules = {name: model.get_submodule(name) for name in left}
    result = compress(model, rank=4, include=["self_attn", "mlp"], exclude=["1.mlp.up"])
    assert not {layer.name for layer in result.layers} & set(left)
    assert len(result.layers) == 14 - len(left)
    assert all(model.get_submodule(name) is module for name, module in modules.items())


def test_a_layer_in_low_rank_form_that_has_hooks_is_left_in_it():
    model, (_, high, *_) = in_all_forms()
    layer = model.get_submodule(high)
    layer.register_forward_hook(lambda *_: None)
    result = compress(model, rank=4)
    assert high not in {layer.name for layer in result.layers}
    assert model.get_submodule(high) is layer


# ---- the dry run, the loss, the table


def test_the_dry_run_says_what_happens_and_touches_nothing():
    model, _ = in_all_forms()
    state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    random = torch.get_rng_state()
    plan = plan_compression(model, parameters=0.5, rank_multiple=4)
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert compress(model, parameters=0.5, rank_multiple=4) == plan


def test_the_loss_is_measured_in_evaluation_mode_before_and_after():
    model, inputs = tiny.llama(attention_dropout=0.5), tiny.batch()
    model.train()
    model.model.layers[1].eval()
    modes = []

    def evaluate(given):
        assert given is model
        modes.append(any(m.training for m in given.modules()))
        return given(**inputs).loss

    twin = tiny.llama().eval()
    before = twin(**inputs).loss.item()
    compress(twin, rank=4)
    after = twin.eval()(**inputs).loss.item()
    result = compress(model, rank=4, evaluate=evaluate)
    assert modes == [False, False]
    assert result.loss == (before, after)
    assert result.loss_difference == after - before != 0
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert not model.model.layers[1].self_attn.q_proj.training
    assert plan_compression(tiny.llama(), rank=4).loss_difference is None


def test_the_table_names_every_layer_and_the_totals():
    result = compress(tiny.llama(), rank=16, evaluate=lambda model: 2.0 if stored(model) == 20480 else 3.5)
    lines = str(result).splitlines()
    assert lines[0] == "compression by rank=16: 6 of 14 layers in factors"
    assert lines[1].split() == ["layer", "out", "x", "in", "rank", "error", "before", "after", "share"]
    assert lines[2].split() == [Q, "32", "x", "32", "dense", "0.0000", "1,024", "1,024", "1.000"]
    assert re.fullmatch(r"model\.layers\.0\.mlp\.gate_proj +64 x 32 +16 +0\.\d{4} +2,048 +1,536 +0\.750", lines[6])
    assert lines[-3] == "target layers: 20,480 -> 17,408 parameters (0.850); forward FLOPs x 0.850"
    assert lines[-2] == "whole model: 24,736 -> 21,664 parameters (0.876)"
    assert lines[-1] == "loss: 2.0000 -> 3.5000 (+1.5000)"
    assert len(lines) == 2 + 14 + 3


# ---- bad input

BAD = [
    ({}, r"give exactly one of rank, rank_ratio, energy, parameters; got none"),
    ({"rank": 4, "energy": 0.9}, r"give exactly one of .*; got rank and energy"),
    ({"rank": 0}, r"rank must be a whole number of at least 1, got 0"),
    ({"rank": 4.0}, r"rank must be a whole number of at least 1, got 4\.0"),
    ({"rank": 32}, r"rank=32 leaves all 14 layers as they are: .* no fewer parameters\. Lower rank"),
    ({"rank_ratio": 0}, r"rank_ratio must be in \(0, 1\], got 0"),
    ({"rank_ratio": "0.5"}, r"rank_ratio must be in \(0, 1\], got '0\.5'"),
    ({"rank_ratio": 0.9}, r"rank_ratio=0\.9 leaves all 14 layers as they are: .*Lower rank_ratio"),
    ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0\.0\. It is the share of"),
    ({"energy": 90}, r"energy must be in \(0, 1\], got 90"),
    ({"energy": math.nan}, r"energy must be in \(0, 1\], got nan"),
    ({"energy": True}, r"energy must be in \(0, 1\], got True"),
    ({"energy": 0.9999}, r"energy=0\.9999 leaves all 14 layers"),
    ({"parameters": 0}, r"parameters must be a share .* in \(0, 1\), .* or a whole number of at least 1, got 0"),
    ({"parameters": 1.0}, r"parameters must be a share .*got 1\.0"),
    ({"parameters": 500.0}, r"parameters must be a share .*got 500\.0"),
    ({"parameters": False}, r"parameters must be a share .*got False"),
    ({"parameters": 20480}, r"parameters=20480 leaves all 14 layers as they are"),
    (
        {"parameters": 0.1},
        r"a budget of 2,048 parameters is too small: at rank 8, the least that rank_multiple allows, the 14 layers "
        r"hold 8,704 \(0\.425 of dense\)\. Raise parameters, or lower rank_multiple",
    ),
    ({"rank": 4, "rank_multiple": 0}, r"rank_multiple must be a whole number of at least 1, got 0"),
    ({"rank": 4, "include": "attn"}, r"include must be a list of regular expressions, got 'attn'"),
    ({"rank": 4, "exclude": ["("]}, r"exclude holds '\(', which is not a regular expression"),
    ({"rank": 4, "include": ["nothing"]}, r"no layer to train in changing rank: .*14 not matched by include"),
]


@pytest.mark.parametrize("function", [compress, plan_compression])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_refused_and_the_model_left_alone(function, arguments, message):
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        function(model, **arguments)
    assert {form_of(m) for m in find_targets(model).targets.values()} == {Dense()}


EVALUATIONS = [
    ("loss", ValueError, r"evaluate must be a function that takes the model and gives a number, got 'loss'"),
    (lambda model: None, ValueError, r"evaluate must give a number, got None"),
    (lambda model: {"loss": 1.0}, ValueError, r"evaluate must give a number, got {'loss': 1\.0}"),
    (lambda model: 1 / 0, ZeroDivisionError, r"division by zero"),
]


@pytest.mark.parametrize(("evaluate", "error", "message"), EVALUATIONS)
def test_an_evaluation_that_fails_leaves_the_model_alone(evaluate, error, message):
    model = tiny.llama().train()
    with pytest.raises(error, match=message):
        compress(model, rank=4, evaluate=evaluate)
    assert {form_of(m) for m in find_targets(model).targets.values()} == {Dense()}
    assert all(m.training for m in model.modules())


def test_a_weight_that_is_not_finite_is_named():
    model = tiny.llama()
    model.get_submodule(Q).weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=rf"{Q}: .* holds inf or nan"):
        compress(model, rank=4)


def test_a_compressed_model_saves_and_loads_as_any_other(tmp_path):
    model = tiny.llama()
    compress(model, parameters=0.5, rank_multiple=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded, tiny.batch()), tiny.logits(model, tiny.batch()))


# ---- by the inputs of calibration batches


def calibrated_inputs(model, batches, name):
    """``C`` of one layer in float64, by a hook of the test; with shrinkage of 0.01, and a mean diagonal of 1."""
    seen, layer = [], model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    hook.remove()
    X = torch.cat(seen)
    C = X.mT @ X / X.square().sum() * X.shape[1]
    return 0.99 * C + 0.01 * torch.eye(len(C))


def calibration_batches():
    return [tiny.batch(rows=4), tiny.batch(rows=8)]


def test_with_calibration_a_layer_keeps_the_most_of_its_outputs():
    model = decaying()
    before, C = weights(model), calibrated_inputs(model, calibration_batches(), Q)
    result = compress(model, rank=6, calibration=iter(calibration_batches()))
    values, E = torch.linalg.eigh(before[Q] @ C @ before[Q].mT)
    U = E[:, -6:]
    torch.testing.assert_close(
        effective_weight(model.get_submodule(Q)).double(), U @ U.mT @ before[Q], rtol=1e-3, atol=1e-5
    )
    layer = next(layer for layer in result.layers if layer.name == Q)
    assert layer.error == pytest.approx((values[:-6].sum() / values.sum()).sqrt().item(), rel=1e-3)
    assert result.calibrated
    assert "layers in factors, errors of outputs on the calibration" in str(result)


def test_ranks_by_energy_and_budget_go_by_outputs_and_the_plan_is_what_is_done():
    model, batches = decaying(), calibration_batches()
    by_weight = plan_compression(model, energy=0.9, rank_multiple=1)
    plan = plan_compression(model, energy=0.9, rank_multiple=1, calibration=batches)
    assert [layer.rank for layer in plan.layers] != [layer.rank for layer in by_weight.layers]
    assert all(layer.error**2 <= 0.1 + 1e-5 for layer in plan.layers)
    assert compress(model, energy=0.9, rank_multiple=1, calibration=batches) == plan
    budget = plan_compression(decaying(), parameters=0.5, rank_multiple=1, calibration=batches)
    assert budget.parameters[1] <= 0.5 * budget.parameters[0]


def test_factors_are_cut_by_their_inputs_as_the_dense_weight_is():
    model, whole = decaying(), decaying()
    swap_in = {name: convert(layer, Factored(16)) for name, layer in find_targets(model).targets.items()}
    replace(model, [Swap(name, model.get_submodule(name), change.module) for name, change in swap_in.items()])
    for name, W in weights(model).items():
        whole.get_submodule(name).weight.data = W.float()
    for each in (model, whole):
        compress(each, rank=4, calibration=calibration_batches())
    for name, W in weights(whole).items():
        torch.testing.assert_close(weights(model)[name], W, rtol=1e-3, atol=1e-4)


def test_what_is_no_calibration_is_refused_before_a_layer_changes():
    model = decaying()
    before = copy.deepcopy(model.state_dict())
    for function in (compress, plan_compression):
        with pytest.raises(ValueError, match=r"calibration has no batch"):
            function(model, rank=4, calibration=[])
        with pytest.raises(
            TypeError, match=r"calibration must be an iterable of batches, got a BatchEncoding|got a dict"
        ):
            function(model, rank=4, calibration=tiny.batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_projections_of_packed_attention_have_the_inputs_of_the_attention():
    """Which calls them within one function, and has them as layers while calibration runs alone."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model, batches = nn.TransformerEncoder(block, 2), [torch.randn(4, 6, 32) for _ in range(2)]
    names = list(model.state_dict())
    plan = plan_compression(model, rank=6, calibration=batches)
    assert list(model.state_dict()) == names
    first = next(layer for layer in plan.layers if layer.name == "layers.0.self_attn.q_proj")
    x = torch.cat(batches).flatten(0, 1).double()
    root = torch.linalg.cholesky(shrunk(x.T @ x / len(x)))
    values = torch.linalg.svdvals(model.layers[0].self_attn.in_proj_weight[:32].double() @ root)
    assert first.error == pytest.approx((values[6:].norm() / values.norm()).item(), rel=1e-3)
