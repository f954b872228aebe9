"""Dtypes of phases under the Trainer, against Accelerate's own mixed precision, bit for bit.

Run this first after an upgrade of accelerate: it fails where ``model.forward`` is wrapped in another way.
"""

import copy
import pickle

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_drt import DRTCallback, DRTConfig
from hf_drt.export.card import method_section
from hf_drt.planning import Paces
from hf_drt.planning.layers import FrozenDict
from hf_drt.trainer.autocast import PhaseForward
from hf_drt.trainer.summary import run_summary

TEXT = "factored/bf16@0 factored/fp32@2 dense/fp32@4 dense/bf16@6"


def trained(folder, schedule, resume=None, **changes):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 1, "drt_export": "native", "use_cpu": True, **changes}
    settings |= {"drt_rank": 4} if "factored" in schedule else {}
    run = tiny.trainer(folder, drt_schedule=schedule, **settings)
    run.train(resume_from_checkpoint=resume)
    return run


def losses(run) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_a_run_in_bf16_by_its_phase_is_one_in_bf16_by_its_arguments(tmp_path):
    """And phases in fp32 switch that off, wherever they are."""
    plain = {
        text: trained(tmp_path / "a", text, bf16=bf16) for text, bf16 in (("factored@0", True), ("dense@0", False))
    }
    assert_equal_runs(trained(tmp_path / "b", "factored/bf16@0"), plain["factored@0"])
    assert_equal_runs(trained(tmp_path / "b", "factored/bf16@0", bf16=True), plain["factored@0"])
    assert_equal_runs(trained(tmp_path / "b", "dense/fp32@0"), plain["dense@0"])
    mixed = trained(tmp_path / "c", "factored/bf16@0 factored/fp32@4")
    assert_equal_runs(trained(tmp_path / "d", "factored@0 factored/fp32@4", bf16=True), mixed)
    assert losses(mixed) != losses(plain["factored@0"])


class Seen(TrainerCallback):
    """The dtype in which a layer computes, in training and in evaluation."""

    def __init__(self):
        self.dtypes = {True: [], False: []}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, args, output: self.dtypes[model.training].append(str(output.dtype)[6:])
        )


def test_training_evaluation_and_what_follows_compute_in_the_dtype_of_the_phase(tmp_path):
    seen = Seen()
    settings = {"max_steps": 4, "drt_rank": 4, "gradient_accumulation_steps": 1, "drt_export": "native"}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    run = tiny.trainer(tmp_path, drt_schedule="factored/bf16@0 factored/fp32@2", **settings)
    run.add_callback(seen)
    run.train()
    assert set(seen.dtypes[True][:3]) == {"bfloat16"}  # a hook a step: 1 + 2, then fp32
    assert set(seen.dtypes[True][3:]) == {"float32"}
    evaluated = list(dict.fromkeys(seen.dtypes[False]))
    assert evaluated == ["bfloat16", "float32"]
    after = len(seen.dtypes[False])
    run.evaluate()
    assert set(seen.dtypes[False][after:]) == {"float32"}
    rows = {row["drt_phase"]: row for row in run.state.log_history if "drt_switch_seconds" in row}
    assert [rows[phase]["drt_dtype_bits"] for phase in (0, 1)] == [16, 32]
    assert "| factored/bf16 | 0 to 2 |" in method_section(run_summary(run.drt, run.state.log_history, "dense", "u/n"))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_resume_is_bitwise_equal_from_a_checkpoint_of_every_phase(tmp_path, optimizer):
    settings = {"optim": optimizer, "save_strategy": "steps", "save_steps": 1}
    expected = trained(tmp_path / "a", TEXT, **settings)
    for step in (1, 3, 5, 7) if optimizer == "sgd" else (3, 7):
        other = trained(tmp_path / "b", TEXT, resume=str(tmp_path / "a" / f"checkpoint-{step}"), optim=optimizer)
        assert_equal_runs(other, expected)
        assert other.drt.state_dict() == expected.drt.state_dict()


@pytest.mark.slow
def test_a_compiled_model_computes_in_the_dtype_of_its_phase(tmp_path):
    text = "factored/bf16@0 factored/fp32@2"
    plain = trained(tmp_path / "a", text, max_steps=4)
    torch._dynamo.utils.counters.clear()
    compiled = trained(tmp_path / "b", text, max_steps=4, torch_compile=True, torch_compile_backend="eager")
    assert_equal_runs(compiled, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # one for each dtype at least


def test_a_model_is_copied_and_pickled_with_its_plain_forward(tmp_path):
    run = trained(tmp_path, "dense/bf16@0")
    assert isinstance(vars(run.model)["forward"], PhaseForward)
    copied = copy.deepcopy(run.model)
    assert copied.forward._forward.__self__ is copied
    loaded = pickle.loads(pickle.dumps(run.model))
    assert not isinstance(loaded.forward, PhaseForward)
    batch = tiny.batch()
    run.model.eval()
    loaded.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = loaded(**batch).logits
    with torch.no_grad():
        assert torch.equal(run.model(**batch).logits, expected.float())
        model = run.model
        del run, copied
        import gc

        gc.collect()
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)  # whose trainer is gone


def test_a_resumed_run_does_not_measure_again(tmp_path, monkeypatch):
    """Nor does it resolve its budget by what this machine would take now."""
    budget = {"drt_schedule": "lowrank:budget/auto@0 dense/fp32@75%", "drt_budget": 0.9, "drt_rank_multiple": 1}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "use_cpu": True, "drt_start": "scratch"}
    paces = Paces(FrozenDict({"dense/fp32": 1.0, "factored/fp32": 1.0}))
    monkeypatch.setattr("hf_drt.planning.resolve.measured_paces", lambda *args: paces)
    first = tiny.trainer(tmp_path / "first", **settings, **budget)
    first.train()
    monkeypatch.setattr("hf_drt.planning.resolve.measured_paces", lambda *args: pytest.fail("measured again"))
    again = tiny.trainer(tmp_path / "again", **settings, **budget)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert again.drt.plan == first.drt.plan
    assert_equal_runs(again, first)


def test_a_callback_in_a_plain_trainer_does_the_same(tmp_path):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "seed": 0,
                 "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}  # fmt: skip

    def run(schedule, **more):
        own = DRTCallback(DRTConfig(schedule=schedule, rank=4))
        args = TrainingArguments(str(tmp_path), **arguments, **more)
        trainer = Trainer(tiny.llama(), args, train_dataset=tiny.dataset(8), callbacks=[own])
        trainer.train()
        return losses(trainer)

    assert run("factored/bf16@0") == run("factored@0", bf16=True)
    with pytest.raises(
        ValueError, match=r"gives dtypes to phases, and the run is in bf16, for which Accelerate has prep"
    ):
        run("factored/bf16@0", bf16=True)


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (
            "dense/fp32@0",
            {"bf16": True},
            r"to all, which is fp32 in all of them, so that bf16=True .*would have no effect",
        ),
        (
            "auto(precision=auto)",
            {"bf16": True},
            r"to all, the budget chooses it, so that bf16=True .*would have no effe",
        ),
        (
            "dense/fp32@0",
            {"fp16": True},
            r"and the run is in fp16, whose loss scaler would go on scaling\. Leave fp16 ou",
        ),
    ],
)
def test_contradictions_with_the_arguments_are_refused(tmp_path, schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, drt_schedule=schedule, drt_start="scratch", use_cpu=True, **settings)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_with_a_policy_of_their_own_are_refused(tmp_path, engine):
    from hf_drt.trainer.autocast import refuse_dtypes

    run = tiny.trainer(tmp_path, drt_schedule="dense@0")
    setattr(run, f"is_{engine}_enabled", True)
    name = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[engine]
    with pytest.raises(ValueError, match=rf"and {name} casts weights and gradients by a policy of its own"):
        refuse_dtypes(run, DRTConfig(schedule="dense/bf16@0"))


def test_a_model_that_accelerate_has_prepared_for_another_trainer_is_refused(tmp_path):
    first = trained(tmp_path, "dense@0", bf16=True)
    with pytest.raises(
        ValueError, match=r"Accelerate has prepared this model for mixed precision already, .*Load the mod"
    ):
        tiny.trainer(tmp_path, model=first.model, drt_schedule="factored@0 dense/fp32@50%", bf16=True, use_cpu=True)
