"""The callback in a plain Trainer refuses what only a DRTTrainer can do."""

import re
from types import SimpleNamespace

import pytest
import tiny
from transformers import Trainer, TrainingArguments

from hf_drt import DRTCallback, DRTConfig

Q = "model.layers.0.self_attn.q_proj"
STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def plain_trainer(folder, config=tiny.PHASES, model=None, **changes) -> Trainer:
    defaults = {"max_steps": 4, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(folder), **defaults | changes)
    data = tiny.dataset()
    return Trainer(model or tiny.llama(), args, train_dataset=data, eval_dataset=data, callbacks=[DRTCallback(config)])


def test_a_callback_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match=r"DRTCallback needs a schedule, e\.g\. 'factored@0 dense@40%.*; got None"):
        DRTCallback(DRTConfig())


@pytest.mark.parametrize("config", [None, {"schedule": tiny.PHASES}, 4], ids=["None", "dict", "number"])
def test_a_callback_with_settings_of_another_type_is_refused(config):
    message = rf"drt settings must be a DRTConfig, or a schedule's text .*, got {re.escape(repr(config))}\."
    with pytest.raises(TypeError, match=message):
        DRTCallback(config)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            tiny.config(),
            {"load_best_model_at_end": True, **STEPS},
            r"load_best_model_at_end loads weights of one phase into the structure of another .*Use DRTTrainer",
        ),
        (
            tiny.config(factored_lr_scale=2.0),
            {},
            r"^factored_lr_scale=2\.0: this needs parameter groups .* DRTTrainer",
        ),
        (
            tiny.config(adapter_lr_scale=2.0),
            {},
            r"^adapter_lr_scale=2\.0: this needs parameter groups .* DRTTrainer",
        ),
        (tiny.config(right_lr_scale=2.0), {}, r"^right_lr_scale=2\.0: this needs parameter groups .* DRTTrainer"),
        (tiny.config(frobenius_decay=True), {}, r"^frobenius_decay=True: this needs parameter groups"),
        (tiny.config(include=["conv"]), {}, r"no layer to train in changing rank"),
    ],
    ids=["best model", "factored_lr_scale", "adapter_lr_scale", "right_lr_scale", "frobenius_decay", "no target"],
)
def test_a_plain_trainer_refuses_what_only_a_drt_trainer_can_do(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        plain_trainer(tmp_path, config, **changes)


def test_a_plain_trainer_refuses_several_processes(tmp_path):
    args = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"DRTCallback runs on one process, got 2\. Use DRTTrainer"):
        DRTCallback(tiny.PHASES).on_init_end(args, None, None, model=tiny.llama())


def test_a_plain_trainer_cannot_resume(tmp_path):
    config = tiny.config(schedule="dense@0 factored@50%")
    plain_trainer(tmp_path, config, save_strategy="steps", save_steps=1).train()
    message = r"DRTCallback in a plain Trainer cannot resume: .* Use DRTTrainer or DRTTrainerMixin to resume"
    with pytest.raises(ValueError, match=message):
        plain_trainer(tmp_path, config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    # In low-rank form the weights do not even load.
    with pytest.raises(RuntimeError, match=rf"size mismatch for {Q}\.weight"):
        plain_trainer(tmp_path, config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
