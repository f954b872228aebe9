"""Recovery: nearer to the reference, nothing else touched, equal to a loop written by hand, and what is refused."""

import copy
import logging
import re
from typing import NamedTuple

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from hf_drt import Dense, Factored, find_targets, form_of
from hf_drt.compress import compress
from hf_drt.forms import layer_of
from hf_drt.linalg.refit import SHRINKAGE
from hf_drt.recovery import DistillationTrainer, compress_and_recover, distance, recover
from hf_drt.recovery import refit as refit_module


def progressions(seed, rows=8, length=12):
    """Arithmetic progressions modulo the vocabulary: text of which there is always more."""
    g = torch.Generator().manual_seed(seed)
    first, step = torch.randint(0, tiny.VOCAB, (rows, 1), generator=g), torch.randint(1, 6, (rows, 1), generator=g)
    ids = (first + step * torch.arange(length)) % tiny.VOCAB
    return {"input_ids": ids, "labels": ids}


CALIBRATION = [progressions(1000 + i) for i in range(12)]


@pytest.fixture(scope="module")
def reference():
    """A Llama that tells progressions."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        model(**progressions(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def smaller(reference):
    model = copy.deepcopy(reference)
    compress(model, parameters=0.5, rank_multiple=2, calibration=CALIBRATION, allocation="uniform")
    return model


@torch.no_grad()
def loss_elsewhere(model):
    """On progressions that no one has seen."""
    return sum(model(**progressions(5000 + i)).loss.item() for i in range(8)) / 8


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_step_brings_the_model_nearer_to_the_reference_and_to_other_text(reference, smaller):
    before = loss_elsewhere(smaller)
    fitted = recover(copy.deepcopy(smaller), reference, CALIBRATION, steps=0)
    result = recover(smaller, reference, CALIBRATION, steps=60, learning_rate=3e-3)
    names = [stage.name for stage in result.stages]
    assert names == ["dense", "compressed", "least squares", "training"]
    dense, compressed, squares, trained = (stage.distance for stage in result.stages)
    assert dense == pytest.approx(0, abs=1e-6)
    assert trained < squares < compressed
    assert squares == pytest.approx(fitted.stages[2].distance, rel=1e-5)
    assert all(stage.kept for stage in result.stages)
    assert loss_elsewhere(reference) < loss_elsewhere(smaller) < before
    assert result.regained == pytest.approx(1 - trained / compressed)
    assert result.steps == 60
    table = str(result)
    assert table.startswith(f"recovery by 60 updates: {result.regained:.0%} of the distance")
    for layer in result.layers:
        assert f"{layer.name}" in table
        assert f"{layer.errors[1]:.4f}" in table


def test_what_is_told_of_batches_kept_aside(reference, smaller):
    """The fifth of twelve, which neither step sees."""
    aside = [CALIBRATION[4]]
    broken = [batch if batch is not CALIBRATION[4] else {} for batch in CALIBRATION]
    result = recover(smaller, reference, CALIBRATION, steps=3)
    with torch.no_grad():
        log_q, log_p = (model(**aside[0]).logits.log_softmax(-1) for model in (smaller, reference))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert result.stages[-1].distance == pytest.approx(expected.item(), rel=1e-4)
        assert result.stages[-1].loss == pytest.approx(smaller(**aside[0]).loss.item(), rel=1e-5)
        assert result.stages[0].loss == pytest.approx(reference(**aside[0]).loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="input_ids"):  # an empty batch, used for judging
        recover(smaller, reference, broken, steps=0)


def test_only_the_factors_change(reference, smaller):
    names = [name for name in find_targets(smaller).targets if isinstance(form_of(layer_of(smaller, name)), Factored)]
    forms = {name: form_of(layer_of(smaller, name)) for name in names}
    theirs, before = states(reference), states(smaller)
    frozen = smaller.model.norm.weight.requires_grad_(False)
    smaller.train()
    smaller.model.layers[0].eval()
    recover(smaller, reference, CALIBRATION, steps=3)
    assert all(torch.equal(value, theirs[name]) for name, value in reference.state_dict().items())
    for name, value in smaller.state_dict().items():
        own = any(name.startswith(f"{layer}.") for layer in names)
        if value.numel():  # a factored layer keeps the name of its weight
            assert torch.equal(value, before[name]) != own, name
    assert {name: form_of(layer_of(smaller, name)) for name in names} == forms
    assert not frozen.requires_grad
    assert smaller.model.embed_tokens.weight.requires_grad
    assert smaller.training
    assert not smaller.model.layers[0].training
    assert not reference.training


def test_the_training_is_that_of_a_loop_by_hand(reference, smaller):
    """AdamW on the divergence, cosine with a twentieth of warm-up, norm clipped at 1, in the same order."""
    by_hand, batches = copy.deepcopy(smaller), CALIBRATION[:3]
    order = []
    handle = smaller.model.embed_tokens.register_forward_pre_hook(lambda m, args: order.append(args[0].clone()))
    recover(smaller, reference, batches, steps=20, learning_rate=1e-3, least_squares=False)
    handle.remove()
    assert len(order) == 9 + 20 + 9  # before and after, each batch for distance, loss and errors
    parameters = [p for name in find_targets(by_hand).targets for p in layer_of(by_hand, name).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, 20)
    by_hand.train()
    for ids in order[9:29]:
        with torch.no_grad():
            p = reference(input_ids=ids).logits.softmax(-1)
        q = by_hand(input_ids=ids).logits
        loss = F.cross_entropy(q.flatten(0, 1), p.flatten(0, 1))  # and the entropy of p, which has no gradient
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(value, smaller.state_dict()[name], atol=2e-5), name


def test_a_step_that_does_harm_is_undone_with_a_warning(reference, smaller, caplog):
    before = states(smaller)
    with caplog.at_level(logging.WARNING, logger="hf_drt"):
        result = recover(smaller, reference, CALIBRATION, steps=10, learning_rate=30.0, least_squares=False)
    (told,) = [record.message for record in caplog.records if "is undone" in record.message]
    assert told.startswith("training has brought the model no nearer to the reference")
    assert told.endswith("Give more calibration batches, or a lower learning_rate.")
    assert [stage.kept for stage in result.stages] == [True, True, False]
    assert "undone" in str(result)
    assert result.regained == 0.0
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "vit", "resnet", "mixtral"])
def test_other_kinds_of_models(kind):
    """Conv1D, an encoder, an encoder beside a decoder, pictures, convolutions, fused experts."""
    reference = getattr(tiny, kind)().eval()
    with torch.no_grad():
        for weight in (p for p in reference.parameters() if p.ndim > 1):
            weight *= 4  # at random the blocks hardly matter
    model, data = copy.deepcopy(reference), [tiny.batch(kind, rows=4) for _ in range(3)]
    compress(model, rank_ratio=0.25, rank_multiple=2)
    result = recover(model, reference, data, steps=30, learning_rate=3e-3, dtype="fp32")
    assert result.stages[-1].distance < result.stages[1].distance
    assert result.layers
    assert any(isinstance(form_of(layer_of(model, layer.name)), Factored) for layer in result.layers)


def test_fused_experts_are_trained_but_not_fitted():
    reference = tiny.mixtral().eval()
    model, data = copy.deepcopy(reference), [tiny.batch("mixtral", rows=8)]
    compress(model, rank=4, include=["experts"])
    before = states(model)
    result = recover(model, reference, data, steps=0)
    assert result.layers == ()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not result.stages[-1].kept
    assert recover(model, reference, data, steps=20, learning_rate=1e-2, least_squares=False).stages[-1].kept


def test_batches_that_are_no_mappings_and_a_loss_of_ones_own(reference, smaller):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    def loss(model, batch):
        batch = batch if torch.is_tensor(batch) else batch[0]
        return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    ids, told = [batch["input_ids"] for batch in CALIBRATION], []
    for batches in (ids, [(each,) for each in ids]):
        models = Logits(copy.deepcopy(smaller)), Logits(copy.deepcopy(reference))
        result = recover(*models, batches, steps=4, loss=loss, progress=lambda *made: told.append(made))
        assert result.stages[0].loss == pytest.approx(reference(**CALIBRATION[4]).loss.item(), rel=1e-4)
    assert told == [(i, 4) for i in (1, 2, 3, 4)] * 2
    without = recover(Logits(copy.deepcopy(smaller)), Logits(copy.deepcopy(reference)), ids, steps=0)
    assert {stage.loss for stage in without.stages} == {None}


@pytest.mark.parametrize("kind", ["mlp.up_proj", "mlp.down_proj"])
def test_least_squares_are_those_of_the_inputs_once_all_before_is_fitted(reference, smaller, kind):
    """A layer of the second block, by hand, and only left factors move."""
    batches, before = CALIBRATION[:3], copy.deepcopy(smaller)
    recover(smaller, reference, batches, steps=0)
    name = f"model.layers.1.{kind}"
    half_way = copy.deepcopy(smaller)
    layer_of(half_way, name).load_state_dict(layer_of(before, name).state_dict())

    def inputs(model):
        seen = []
        handle = layer_of(model, name).register_forward_hook(lambda m, args, y: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        return torch.cat(seen).double()

    x, other = inputs(reference), inputs(half_way)
    U, V, W = layer_of(before, name).U, layer_of(before, name).V, layer_of(reference, name).weight
    hidden = other @ V.double().mT
    ridge = (SHRINKAGE * hidden.square().sum() / hidden.shape[1]).sqrt()
    rows = torch.cat([hidden, ridge * torch.eye(hidden.shape[1])])
    wanted = torch.cat([x @ W.double().mT, ridge * U.double().mT])
    expected = torch.linalg.lstsq(rows, wanted).solution.mT.float()
    assert torch.allclose(layer_of(smaller, name).U, expected, atol=1e-4)
    assert not torch.allclose(layer_of(smaller, name).U, U, atol=1e-2)
    assert torch.equal(layer_of(smaller, name).V, V)


def test_a_model_that_is_no_chain_is_fitted_alike(reference, smaller, monkeypatch):
    other = copy.deepcopy(smaller)
    recover(smaller, reference, CALIBRATION, steps=0)
    monkeypatch.setattr(refit_module, "chained", lambda *_: None)
    recover(other, reference, CALIBRATION, steps=0)
    assert all(torch.allclose(v, other.state_dict()[n], atol=1e-6) for n, v in smaller.state_dict().items())


def test_one_call_does_both(reference):
    one, two = copy.deepcopy(reference), copy.deepcopy(reference)
    options = {"parameters": 0.5, "rank_multiple": 2}
    both = compress_and_recover(
        one,
        calibration=iter(CALIBRATION),
        recover_steps=3,
        evaluate=loss_elsewhere,
        recover_options={"seed": 7},
        **options,
    )
    compression = compress(two, calibration=CALIBRATION, evaluate=loss_elsewhere, **options)
    result = recover(two, reference, CALIBRATION, steps=3, seed=7)
    assert both.compression == compression
    assert both.layers == result.layers
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert both.losses == (*compression.loss, loss_elsewhere(two))
    assert f"recovered {both.losses[2]:.4f}" in str(both)


def test_the_trainer_takes_any_schedule(reference, smaller, tmp_path):
    """Distillation through a phase of full rank, with evaluation."""
    schedule = "factored:4@0 dense@50%"
    arguments = tiny.arguments(tmp_path, max_steps=30, drt_schedule=schedule, gradient_accumulation_steps=1)
    data = tiny.dataset()
    trainer = DistillationTrainer(
        model=smaller, args=arguments, train_dataset=data, eval_dataset=data, reference=reference
    )
    trainer.train()
    with torch.no_grad():
        expected = distance(smaller.eval()(**tiny.batch(rows=64)), reference(**tiny.batch(rows=64)), {})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert isinstance(form_of(layer_of(smaller, "model.layers.0.mlp.up_proj")), Dense)
    first, *_, last = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert last < first


def test_bfloat16(reference, smaller):
    result = recover(smaller, reference, CALIBRATION, steps=20, learning_rate=1e-3, dtype="bf16")
    assert result.stages[-1].distance < result.stages[1].distance
    assert {p.dtype for p in smaller.parameters()} == {torch.float32}


def test_more_text_is_for_the_training_alone(reference, smaller):
    few = CALIBRATION[:4]
    more = [progressions(3000 + i) for i in range(56)]
    given = {"steps": 60, "learning_rate": 3e-3}
    twin = copy.deepcopy(smaller)
    result = recover(smaller, reference, few, training=iter(more), **given)
    alone = recover(twin, reference, few, **given)
    for stage, other in zip(result.stages[:3], alone.stages[:3], strict=True):
        assert (stage.distance, stage.loss, stage.kept) == (other.distance, other.loss, other.kept)
    assert loss_elsewhere(smaller) < loss_elsewhere(twin)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0, "training": [1]}, "training has no effect with steps=0. Raise steps, or leave training out."),
        ({"training": []}, "training has no batch. An iterator that has been used up gives none: make a new one."),
        ({"steps": -1}, "steps must be a whole number of at least 0, got -1."),
        ({"steps": True}, "steps must be a whole number of at least 0, got True."),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0."),
        ({"dtype": "fp8"}, "dtype must be one of fp32, bf16, got 'fp8'."),
        ({"steps": 0, "least_squares": False}, "leave nothing to do. Raise steps, or leave least_squares on."),
    ],
)
def test_values_outside_of_their_intervals(reference, smaller, given, message):
    before = states(smaller)
    with pytest.raises(ValueError, match=re.escape(message)):
        recover(smaller, reference, CALIBRATION, **given)
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items())


def test_an_interruption_leaves_no_layer_half_trained(reference, smaller):
    def interrupt(done, steps):
        if done == 2:
            raise KeyboardInterrupt

    before = states(smaller)
    smaller.train()
    with pytest.raises(KeyboardInterrupt):
        recover(smaller, reference, CALIBRATION, steps=5, least_squares=False, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in smaller.parameters())
    assert smaller.training


def test_models_that_do_not_go_together(reference, smaller):
    with pytest.raises(ValueError, match=r"the reference is the model itself\. Make a copy of the model before"):
        recover(smaller, smaller, CALIBRATION)
    with pytest.raises(ValueError, match="no layer of the model is in factored form: there is nothing to recover"):
        recover(copy.deepcopy(reference), reference, CALIBRATION)
    with pytest.raises(
        ValueError, match=r"no layer 'model\.layers\.\d.*' of the same shape, which the model has in factored form"
    ):
        recover(smaller, tiny.gpt2(), CALIBRATION)
    with pytest.raises(ValueError, match="calibration has no batch"):
        recover(smaller, reference, [])
    with pytest.raises(TypeError, match=r"training must be an iterable of batches, got a dict\."):
        recover(smaller, reference, CALIBRATION, training=CALIBRATION[0])


def test_the_trainer_takes_the_mean_over_accumulated_batches_and_evaluates_without_labels(reference, smaller, tmp_path):
    """Of equal lengths two batches of four are one of eight."""
    data = tiny.dataset(rows=8)
    rows = {}
    for accumulated in (1, 2):
        model = copy.deepcopy(smaller)
        arguments = tiny.arguments(
            tmp_path, max_steps=1, drt_schedule=None, gradient_accumulation_steps=accumulated, logging_steps=1,
            per_device_train_batch_size=8 // accumulated,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data.remove_columns("labels"),
            reference=reference,
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        rows[accumulated] = next(row for row in trainer.state.log_history if "grad_norm" in row)
        assert rows[accumulated]["loss"] == pytest.approx(before, rel=1e-3)
    assert rows[1]["grad_norm"] == pytest.approx(rows[2]["grad_norm"], rel=1e-3)


class Named(NamedTuple):
    ids: torch.Tensor


class Argument(torch.nn.Module):
    """A model with an argument of the name that the Trainer's batches have."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, scale=1.0):
        return self.model(input_ids=batch).logits + scale


def test_batches_reach_the_model_as_they_are(reference, smaller):
    ids, told = CALIBRATION[0]["input_ids"], []
    for batch in (Named(ids), {"batch": ids, "scale": 3.0}):
        models = Argument(copy.deepcopy(smaller)), Argument(copy.deepcopy(reference))
        models[0].register_forward_pre_hook(lambda m, args, kwargs: told.append((args, kwargs)), with_kwargs=True)
        recover(*models, [batch] * 3, steps=2)
    assert {len(args) for args, _ in told} == {0, 1}
    assert all(args or kwargs["scale"] == 3.0 for args, kwargs in told)
