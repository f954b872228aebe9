"""What was asked of Accelerate, by arguments or by accelerate launch, and is not what runs, is said with what does."""

import pytest
import tiny
from transformers import Trainer

from hf_drt import DRTCallback
from hf_drt.trainer.fallbacks import fallbacks

ZERO = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
CASES = {
    "fp16": (
        {},
        {"fp16": True},
        "fp16=True has no effect: Accelerate has no fp16 on a CPU, and trains in the dtype of",
    ),
    "fp16 by the launcher": (
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {},
        "ACCELERATE_MIXED_PRECISION=fp16 has no effect: Accelerate has no fp16 on a CPU",
    ),
    "deepspeed by the launcher": (
        {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"},
        {},
        "deepspeed was asked for, but Accelerate trains with a single process: ACCELERATE_USE_CPU is set",
    ),
    "fsdp by the launcher": (
        {"ACCELERATE_USE_FSDP": "true"},
        {},
        "fsdp was asked for, but the model is not sharded: Accelerate trains with a single process here",
    ),
    "fsdp_config alone": (
        {},
        {"fsdp_config": {"version": 2}},
        "fsdp_config was given without fsdp, and is not read: this run trains with a single process. Say fsdp=True",
    ),
    "accumulation by the launcher": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {},
        "accelerate launch was given gradient_accumulation_steps=4, but the Trainer goes by its own setting: an update "
        "is made of 2 here. Set the training argument gradient_accumulation_steps=4.",
    ),
    "srun": ({"SLURM_STEP_NUM_TASKS": "4"}, {}, "srun has started 4 tasks, but a single process trains here: each"),
    "processes by the launcher": (
        {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"},
        {},
        "accelerate launch seems to have been asked for several processes, but has started one: on a CPU it needs",
    ),
}


def with_environment(monkeypatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("environment", "settings", "message"), CASES.values(), ids=CASES)
def test_what_falls_back_in_silence_is_said(tmp_path, monkeypatch, caplog, environment, settings, message):
    with_environment(monkeypatch, environment)
    tiny.trainer(tmp_path, **settings)
    (said,) = (record.message for record in caplog.records if record.name == "hf_drt.trainer.fallbacks")
    assert said.startswith(message)


def test_deepspeed_as_an_argument(tmp_path, monkeypatch, caplog):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # Accelerate sets it; taken out again after the test
    tiny.trainer(tmp_path, deepspeed=ZERO)
    assert "deepspeed was asked for, but Accelerate trains with a single process" in caplog.text


def test_a_callback_says_it_as_training_begins(tmp_path, caplog):
    trainer = tiny.trainer(
        tmp_path,
        cls=lambda **given: Trainer(**given, callbacks=[DRTCallback("factored:4@0")]),
        drt_schedule=None,
        fp16=True,
        max_steps=1,
    )
    assert "has no effect" not in caplog.text
    trainer.train()
    assert caplog.text.count("fp16=True has no effect") == 1


def test_a_second_trainer_that_is_to_compile_finds_the_accelerator_of_the_first(tmp_path, caplog):
    """Where both arguments were made before both trainers."""
    plain, compiled = tiny.arguments(tmp_path), tiny.arguments(tmp_path, torch_compile=True)
    for args in (plain, compiled):
        trainer = tiny.DRTTrainer(model=tiny.llama(), args=args, train_dataset=tiny.dataset())
    assert "torch_compile was asked for, but nothing is compiled: the Accelerator of this process" in caplog.text
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({"MASTER_ADDR": "127.0.0.1"}, {}),
        ({"ACCELERATE_USE_FSDP": "false"}, {"ddp_timeout": 60}),
        ({}, {"bf16": True, "use_cpu": True}),
    ],
    ids=str,
)
def test_of_what_is_in_force_nothing_is_said(tmp_path, monkeypatch, environment, settings):
    with_environment(monkeypatch, environment)
    trainer = tiny.trainer(tmp_path, **settings)
    assert list(fallbacks(trainer.args, trainer.accelerator.state)) == []
