"""A budget shared out by measured harm, against equal shares on the calibration; block by block; fused experts."""

import copy
import logging
import math

import pytest
import tiny
import torch
from torch import nn

from hf_drt import Dense, Factored, effective_weight, find_targets, form_of
from hf_drt.compress import compress, plan_compression
from hf_drt.compress.layers import measured_layer, truncated_parts
from hf_drt.covariance import covariances_of, sensitivity_of
from hf_drt.forms import FactoredLinear, layer_of
from hf_drt.linalg import shrunk


def loss_of(model, batch):
    return model(**batch).loss


def batches():
    return [tiny.batch(rows=8), tiny.batch(rows=16)]


@pytest.fixture(scope="module")
def trained():
    """A Llama that has learnt rows by heart, so that its loss depends on its weights."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss_of(model, tiny.batch(rows=16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def weights(model):
    return {n: effective_weight(layer_of(model, n)).double().clone() for n in find_targets(model).targets}


@torch.no_grad()
def calibration_loss(model):
    return math.fsum(loss_of(model.eval(), batch).item() for batch in batches()) / 2


# ---- which ranks


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_never_worse_than_equal_shares_and_what_is_told_is_what_is_measured(trained, share):
    losses, parameters = {}, {}
    for allocation in ("uniform", None):
        model = copy.deepcopy(trained)
        result = compress(model, parameters=share, rank_multiple=2, calibration=batches(), allocation=allocation)
        losses[allocation], parameters[allocation] = calibration_loss(model), result.parameters[1]
    assert losses[None] <= losses["uniform"] + 1e-6
    dense, harm, uniform = result.trials
    assert (dense.allocation, harm.allocation, uniform.allocation) == ("dense", "harm", "uniform")
    assert dense.loss == pytest.approx(calibration_loss(trained), rel=1e-6)
    assert uniform.loss == pytest.approx(losses["uniform"], rel=1e-5)
    assert min(harm.loss, uniform.loss) == pytest.approx(losses[None], rel=1e-5)
    assert result.allocation == ("harm" if harm.loss <= uniform.loss else "uniform")
    assert uniform.parameters == parameters["uniform"] <= share * result.parameters[0]
    assert max(harm.parameters, result.parameters[1]) <= share * result.parameters[0]


def test_equal_shares_are_taken_where_they_are_better(trained, monkeypatch):
    """With estimates turned round, so that the layers that matter most are cut most."""
    from hf_drt.compress import choice

    def turned(name, layer, C=None, G=None):
        real = measured_layer(name, layer, C, G)
        return real if G is None else type(real)(**vars(real) | {"scale": 1 / real.scale})

    monkeypatch.setattr(choice, "measured_layer", turned)
    model = copy.deepcopy(trained)
    result = compress(model, parameters=0.6, rank_multiple=2, calibration=batches())
    harm, uniform = result.trials[1:]
    assert harm.loss > uniform.loss
    assert result.allocation == "uniform"
    assert calibration_loss(model) == pytest.approx(uniform.loss, rel=1e-5)
    assert f"uniform {uniform.loss:.4f} at {uniform.parameters:,} parameters (taken)" in str(result)


def test_a_layer_on_which_the_loss_does_not_depend_is_cut_first_and_one_that_it_needs_stays_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(64, 16)
    targets = [layer(x).detach() + torch.randn(64, 16) for layer in model]

    def loss(model, x):
        return sum(w * (model[i](x) - targets[i]).square().mean() for i, w in ((0, 1.0), (1, 1e-6)))

    result = compress(model, parameters=0.7, rank_multiple=1, calibration=[x], loss=loss, allocation="harm")
    first, second = result.layers
    assert result.allocation == "harm"
    assert first.form == Dense()
    assert isinstance(second.form, Factored)


def test_the_harm_of_a_rank_is_the_second_order_term_of_the_truncation_that_is_made(trained):
    targets = find_targets(trained).targets
    C, G = covariances_of(trained, targets, batches()), sensitivity_of(trained, targets, batches(), loss_of).G
    for name, module in targets.items():
        layer = measured_layer(name, module, C[name], G[name])
        W = effective_weight(module).double()
        Cs = shrunk(C[name].double()) * C[name].diagonal().mean()
        Gs = shrunk(G[name].double(), 0.1) * G[name].diagonal().mean()
        for rank in (1, 5, 20):
            U, S, Vh, error = truncated_parts(module, Factored(rank), C[name], G[name])
            D = W - (U * S @ Vh).double()
            harm = 0.5 * torch.trace(D @ Cs @ D.T @ Gs).item()
            assert layer.harm(Factored(rank)) == pytest.approx(harm, rel=1e-3)
            assert error.item() == pytest.approx(layer.error(Factored(rank)), rel=1e-4)


def test_equal_shares_give_each_layer_the_same_share():
    result = plan_compression(tiny.llama(), parameters=0.7, rank_multiple=1, allocation="uniform")
    assert result.allocation == "uniform"
    for layer in result.layers:
        full = layer.shape[0] * layer.shape[1] / sum(layer.shape)
        assert abs(layer.rank - 0.7 * full) <= 1
    assert 0.6 < result.flops <= 0.7


def test_the_plan_is_what_is_done_and_touches_nothing(trained):
    model = copy.deepcopy(trained)
    state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    plan = plan_compression(model, parameters=0.6, rank_multiple=2, calibration=batches())
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert compress(model, parameters=0.6, rank_multiple=2, calibration=iter(batches())) == plan


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_is_computed_twice_where_all_moments_are_kept(trained, monkeypatch, sequential):
    """One forward pass to look for a loss, one a batch for the moments, one a batch for each trial; one truncation a
    layer for each trial."""
    from hf_drt.compress import compression, inputs

    model, calls, cut = copy.deepcopy(trained), [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    for module in (compression, inputs):
        real = module.truncated_parts
        monkeypatch.setattr(module, "truncated_parts", lambda *args, real=real: cut.append(1) or real(*args))
    result = compress(model, parameters=0.8, rank_multiple=2, calibration=batches(), sequential=sequential)
    factored = sum(layer.rank is not None for layer in result.layers)
    if not sequential:
        assert len(calls) == 1 + 3 * len(batches())
        assert len(cut) <= factored + len(result.layers)
        assert result.allocation == "harm"
    else:  # block by block a trial's factors are not kept
        assert len(calls) > 1 + 3 * len(batches())
        assert len(cut) > factored + len(result.layers)


def test_a_trial_that_fails_leaves_the_model_alone(trained):
    model = copy.deepcopy(trained).train()

    def loss(model, batch):
        if any(isinstance(module, FactoredLinear) for module in model.modules()):
            raise ZeroDivisionError("in the trial")
        return loss_of(model, batch)

    with pytest.raises(ZeroDivisionError, match="in the trial"):
        compress(model, parameters=0.6, rank_multiple=2, calibration=batches(), loss=loss)
    assert {form_of(m) for m in find_targets(model).targets.values()} == {Dense()}
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_causal_language_model_needs_no_labels(trained):
    plain = [{"input_ids": batch["input_ids"]} for batch in batches()]
    one, other = (
        plan_compression(trained, parameters=0.6, rank_multiple=2, calibration=given) for given in (plain, batches())
    )
    assert one == other


def test_batches_without_a_loss_go_by_the_relative_errors_and_say_so(caplog):
    model, rows = tiny.bert(), [{"input_ids": tiny.batch("bert")["input_ids"]}]
    with caplog.at_level(logging.WARNING):
        result = plan_compression(model, parameters=0.6, rank_multiple=2, calibration=rows)
    assert result.allocation == "error"
    assert not result.trials
    assert "calibration batches give no loss, so the budget is shared out by the layers' relative errors" in caplog.text
    with pytest.raises(ValueError, match=r"for a calibration batch has no loss, .* Give batches with labels, or"):
        plan_compression(model, parameters=0.6, rank_multiple=2, calibration=rows, allocation="harm")


def test_packed_attention_is_tried_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model, rows = nn.TransformerEncoder(block, 2), [torch.randn(4, 6, 32) for _ in range(2)]
    target = torch.randn(4, 6, 32)
    names = list(model.state_dict())

    def loss(model, x):
        return (model(x) - target).square().mean()

    plan = plan_compression(model, parameters=0.6, rank_multiple=2, calibration=rows, loss=loss)
    assert list(model.state_dict()) == names
    assert any("q_proj" in layer.name and layer.rank for layer in plan.layers)
    assert compress(model, parameters=0.6, rank_multiple=2, calibration=rows, loss=loss) == plan
    after = math.fsum(loss(model.eval(), x).item() for x in rows) / 2
    assert after == pytest.approx(min(trial.loss for trial in plan.trials[1:]), rel=1e-5)


# ---- block by block


def test_sequential_is_what_one_gets_by_compressing_block_after_block(trained):
    model, by_hand = copy.deepcopy(trained), copy.deepcopy(trained)
    compress(model, rank=10, calibration=batches(), sequential=True)
    for block in (0, 1):
        compress(by_hand, rank=10, calibration=batches(), include=[rf"layers\.{block}\."])
    parallel = copy.deepcopy(trained)
    compress(parallel, rank=10, calibration=batches())
    moved = 0.0
    for name, W in weights(by_hand).items():
        torch.testing.assert_close(weights(model)[name], W, rtol=1e-4, atol=1e-6)
        moved = max(moved, (weights(parallel)[name] - W).norm().item() / W.norm().item())
        if ".layers.0." in name:
            torch.testing.assert_close(weights(parallel)[name], W, rtol=1e-4, atol=1e-6)
    assert moved > 1e-3, "the second block has other inputs"


def test_sequential_shares_out_as_at_once_and_its_trials_are_of_what_is_done(trained):
    model = copy.deepcopy(trained)
    result = compress(model, parameters=0.6, rank_multiple=2, calibration=iter(batches()), sequential=True)
    at_once = plan_compression(trained, parameters=0.6, rank_multiple=2, calibration=batches())
    assert result.trials[1].parameters == at_once.trials[1].parameters
    assert calibration_loss(model) == pytest.approx(min(trial.loss for trial in result.trials[1:]), rel=1e-5)
    assert calibration_loss(model) == pytest.approx(min(trial.loss for trial in at_once.trials[1:]), rel=0.5)


# ---- fused experts


def test_fused_experts_are_truncated_each_by_its_own_tokens():
    model = tiny.mixtral()
    names = [name for name in find_targets(model).targets if "experts" in name]
    before = weights(model)
    C = covariances_of(model, {name: layer_of(model, name) for name in names}, batches())
    total = sum(p.numel() for p in model.parameters())
    result = compress(model, rank=6, calibration=batches())
    for name in names:
        assert form_of(layer_of(model, name)) == Factored(6)
        lost = kept = 0.0
        for expert in range(4):
            W, mean = before[name][expert], C[name][expert].diagonal().mean().item()
            root = torch.linalg.cholesky(shrunk(C[name][expert].double()))
            values, E = torch.linalg.eigh(W @ root @ root.T @ W.T)
            U = E[:, -6:]
            found = effective_weight(layer_of(model, name))[expert].double()
            torch.testing.assert_close(found, U @ U.T @ W, rtol=1e-3, atol=1e-5)
            lost, kept = lost + mean * values[:-6].sum().item(), kept + mean * values[-6:].sum().item()
        layer = next(layer for layer in result.layers if layer.name == name)
        assert layer.error == pytest.approx(math.sqrt(lost / (lost + kept)), rel=1e-3)
        assert layer.parameters == (before[name].numel(), 4 * 6 * sum(layer.shape))
    assert result.model_parameters == (total, sum(p.numel() for p in model.parameters()))
    loss_of(model, batches()[0]).backward()


@pytest.mark.parametrize("sequential", [False, True])
def test_fused_experts_share_a_budget_with_the_other_layers(sequential):
    model = tiny.mixtral()
    plan = plan_compression(model, parameters=0.5, rank_multiple=2, calibration=batches(), sequential=sequential)
    result = compress(model, parameters=0.5, rank_multiple=2, calibration=batches(), sequential=sequential)
    assert result == plan
    held = sum(p.numel() for n in find_targets(model).targets for k, p in layer_of(model, n).named_parameters())
    assert result.parameters[1] == held <= 0.5 * result.parameters[0]
    assert calibration_loss(model) == pytest.approx(min(trial.loss for trial in plan.trials[1:]), rel=1e-5)


def test_fused_experts_by_weights_alone_and_an_expert_without_tokens():
    model = tiny.mixtral()
    before = weights(model)
    (name, _) = (name for name in find_targets(model).targets if "experts" in name)
    compress(copy.deepcopy(model), rank=6)
    stack = layer_of(model, name)
    C = torch.stack([torch.zeros(32, 32)] + [torch.eye(32)] * 3)
    layer = measured_layer(name, stack, C)
    tails = [torch.linalg.svdvals(W)[6:].square().sum() for W in before[name][1:]]
    whole = [W.square().sum() for W in before[name][1:]]
    assert layer.error(Factored(6)) == pytest.approx(math.sqrt(sum(tails) / sum(whole)), rel=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "best"}, r"allocation must be one of harm, error, uniform, got 'best'"),
        ({"allocation": "harm"}, r"allocation='harm' needs calibration batches\. Give calibration=batches"),
        ({"sequential": True}, r"sequential=True needs calibration batches"),
        ({"loss": loss_of}, r"loss needs calibration batches"),
        ({"loss": "mse"}, r"loss must be a function of the model and a batch, got 'mse'"),
        (
            {"loss": loss_of, "allocation": "uniform", "calibration": batches()},
            r"loss has no effect but with parameters and allocation='harm'",
        ),
        (
            {"allocation": "uniform", "parameters": None, "rank": 4},
            r"allocation='uniform' has no effect with rank: it shares out a budget\. Set parameters",
        ),
    ],
)
def test_settings_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_compression(tiny.llama(), **{"parameters": 0.6, **arguments})


def test_a_deep_cut_by_weights_alone_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        compress(tiny.llama(), parameters=0.6, rank_multiple=2, calibration=batches())
    assert "by the weights alone" not in caplog.text
    with caplog.at_level(logging.WARNING):
        compress(tiny.llama(), parameters=0.6, rank_multiple=2)
    assert "of the target layers' parameters are kept, by the weights alone (relative error" in caplog.text
    assert "Give calibration=batches." in caplog.text
