"""Full rank in turns under the Trainer: resume, the best model, what is delivered and written, and what is told."""

import json

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from hf_drt import DRTTrainer, form_of
from hf_drt.export.card import method_section
from hf_drt.forms import Dense
from hf_drt.trainer.summary import run_summary

STEPS = 8
TURNS = "factored@0 dense[1/2]@2 dense[2/2]+{after}[1/2]@4 {after}[2/2]@6"
KINDS = {
    "frozen": {"drt_schedule": TURNS.format(after="frozen"), "drt_frozen_dtype": "bfloat16", "drt_moments": "project"},
    "need": {"drt_schedule": "rotate(groups=3,share=75,order=need)"},
    "adapter": {"drt_schedule": TURNS.format(after="adapter"), "drt_adapter_lr_scale": 0.5},
    "lowrank": {"drt_schedule": "rotate(groups=2,share=75,after=lowrank,rounds=2)", "drt_start": "scratch"},
    "factored": {"drt_schedule": TURNS.format(after="factored"), "optim": "adafactor"},
    "muon": {"drt_schedule": TURNS.format(after="frozen"), "drt_matrix_optimizer": "muon", "drt_matrix_lr": 0.01},
}


def trainer(folder, **changes) -> DRTTrainer:
    settings = {"max_steps": STEPS, "drt_rank": 4, "gradient_accumulation_steps": 1, **changes}
    return tiny.trainer(folder, **settings)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise_equal_from_a_checkpoint_of_every_phase(tmp_path, kind):
    settings = KINDS[kind] | {"drt_export": "native"}
    expected = trainer(tmp_path / "a", save_strategy="steps", save_steps=1, **settings)
    expected.train()
    for step in (1, 3, 5, 7) if kind in ("frozen", "need") else (3, 5):
        other = trainer(tmp_path / "b", **settings)
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(other, expected)
        assert str(other.drt.plan) == str(expected.drt.plan)
        assert other.drt.state_dict() == expected.drt.state_dict()


@pytest.mark.parametrize("kind", ["frozen", "adapter", "muon"])
def test_the_trained_model_is_a_plain_one_and_loads_without_this_package(tmp_path, kind):
    run = trainer(tmp_path, **KINDS[kind])
    run.train()
    plain = tiny.llama()
    assert [(n, p.dtype, p.requires_grad) for n, p in run.model.named_parameters()] == [
        (n, p.dtype, True) for n, p in plain.named_parameters()
    ]
    assert {form_of(layer) for layer in map(run.model.get_submodule, run.drt.targets)} == {Dense()}
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tiny.logits(loaded, tiny.batch()) - tiny.logits(run.model, tiny.batch())).abs().max() <= 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_the_card_shows_groups_over_time(tmp_path):
    run = trainer(tmp_path, **KINDS["frozen"])
    run.train()
    card = method_section(run_summary(run.drt, run.state.log_history, "dense", "user/name"))
    count = run.drt.plan.phases[-1].parts[0].group.of
    for number in range(1, count + 1):
        assert f"group {number}/{count}  " in card
    for phase in run.drt.plan.phases:
        assert f"| {phase.form if phase.parts else phase.kind} | {phase.start} to " in card


def test_a_checkpoint_of_frozen_layers_loads_as_a_dense_model(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, **KINDS["frozen"])
    run.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7", dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert set(dict(loaded.named_parameters())) == set(dict(tiny.llama().named_parameters()))


@pytest.mark.parametrize("kind", ["frozen", "need"])
def test_the_best_model_of_an_earlier_phase_comes_back(tmp_path, kind):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(tmp_path, **settings, **best, **KINDS[kind])
    run.train()
    rows = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    step = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert run.evaluate()["eval_loss"] == pytest.approx(rows[step], abs=1e-4)
    assert rows[step] == max(rows.values())


def test_a_run_that_stops_in_a_turn_delivers_a_dense_model(tmp_path, caplog):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(tmp_path, **settings, **best, **KINDS["frozen"])
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=4))
    run.train()
    assert run.state.global_step < STEPS
    assert {form_of(layer) for layer in map(run.model.get_submodule, run.drt.targets)} == {Dense()}


def test_turns_are_logged_and_effective_ranks_are_those_of_all_layers(tmp_path):
    run = trainer(tmp_path, drt_log_rank_steps=2, logging_steps=1, drt_log_rank_per_layer=True, **KINDS["need"])
    run.train()
    rows = run.state.log_history
    assert [row["drt_phase"] for row in rows if "drt_switch_seconds" in row] == [0, 1, 2, 3]
    ranked = [row for row in rows if "drt_effective_rank_mean" in row]
    assert [row["step"] for row in ranked] == [2, 4, 6, 8]
    for row in ranked:
        ranks = [row[f"drt_effective_rank/{name}"] for name in run.drt.targets]
        assert row["drt_effective_rank_mean"] == pytest.approx(sum(ranks) / len(ranks))
    assert sorted(row["group"] for row in run.drt.turns.trace) == [1, 2, 3]


def test_a_second_run_decides_on_its_turns_anew(tmp_path):
    run = trainer(tmp_path, **KINDS["need"])
    run.train()
    first, seen = run.drt, list(run.drt.turns.trace)
    run.train()
    assert run.drt is not first
    assert sorted(row["group"] for row in run.drt.turns.trace) == [1, 2, 3]
    assert run.drt.turns.trace != seen
    assert run.drt.turns.reference != first.turns.reference


def test_accumulation_meets_the_same_gradient(tmp_path):
    runs = {}
    for batch, accumulation in ((8, 1), (4, 2)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        model = tiny.llama()
        run = tiny.trainer(tmp_path / str(batch), model, max_steps=STEPS, drt_rank=4, **settings, **KINDS["need"])
        run.train()
        runs[batch] = run.model.state_dict()
    for name, p in runs[8].items():
        assert torch.allclose(p, runs[4][name], atol=1e-5), name
