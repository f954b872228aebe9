"""Training that ends before its plan does says which phases were never reached, whatever has ended it."""

import logging
import re

import pytest
import tiny
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_drt import Adapter, Dense, DRTCallback, DRTConfig, Factored, form_of
from hf_drt.schedule import Phase, Plan
from hf_drt.trainer.early_end import warn_of_early_end

PLAN = "factored@0 dense@4 adapter@8"
RUN = {"max_steps": 10, "drt_schedule": PLAN, "drt_export": "native", "gradient_accumulation_steps": 1}
NEVER = (
    r"training ended after 2 of 10 update steps, before 'dense@4 adapter@8' of the plan 'factored@0 dense@4 adapter@8' "
    r"began: the model was trained in factored form only, and never at full rank\. Give what ended it more patience "
    r"\(early_stopping_patience of EarlyStoppingCallback, a longer time limit\), let these phases begin earlier, or "
    r"resume from the last checkpoint\."
)


class Stop(TrainerCallback):
    """Ends training after an update step, as a limit of time would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hf_drt.trainer.early_end"]


def forms(trainer) -> set[type]:
    return {type(form_of(trainer.model.get_submodule(name))) for name in trainer.drt.targets}


def run(folder, callback=None, resume=None, **changes):
    trainer = tiny.trainer(folder, **RUN | changes)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_stops_before_full_rank_says_so(tmp_path, caplog, step):
    trainer = run(tmp_path, Stop(step))
    (message,) = warnings(caplog)
    assert re.fullmatch(NEVER.replace("after 2", f"after {step}"), message)
    assert trainer.state.global_step == step
    assert forms(trainer) == {Factored}


def test_early_stopping_says_so_too_and_a_resumed_run_reaches_full_rank(tmp_path, caplog):
    stop = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "metric_for_best_model": "loss", "load_best_model_at_end": True}  # fmt: skip
    run(tmp_path, EarlyStoppingCallback(1, early_stopping_threshold=1e9), **stop)  # no score is better by so much
    (message,) = warnings(caplog)
    assert "never at full rank" in message
    caplog.clear()
    trainer = run(tmp_path, resume=str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert warnings(caplog) == []
    assert forms(trainer) == {Adapter}


def test_a_plain_trainer_says_so(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), max_steps=10, report_to=[], save_strategy="no", use_cpu=True)
    callback = DRTCallback(DRTConfig(schedule=PLAN, rank=4, export="native"))
    Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback, Stop(2)]).train()
    (message,) = warnings(caplog)
    assert re.fullmatch(NEVER, message)
    assert callback.controller.phase == 0


def test_a_run_that_has_had_full_rank_names_what_it_learned_last(tmp_path, caplog):
    trainer = run(tmp_path, Stop(6))
    (message,) = warnings(caplog)
    assert "before 'adapter@8' of the plan" in message
    assert "what the model has learned last is that of phase 'dense@4'." in message
    assert forms(trainer) == {Dense}


@pytest.mark.parametrize("stop", [9, 10, 99])
def test_nothing_is_said_once_the_last_phase_has_begun(tmp_path, caplog, stop):
    run(tmp_path, Stop(stop))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("kinds", "step", "said"),
    [
        (("adapter", "factored", "dense"), 15, "the model was trained in adapter and factored form only"),
        (("dense", "factored", "dense"), 5, "what the model has learned last is that of phase 'dense@0'"),
        (("factored", "adapter"), 10, "what the model has learned last is that of phase 'factored@0'"),
    ],
)
def test_what_is_said_of_other_plans(caplog, kinds, step, said):
    plan = Plan(tuple(Phase(10 * index, kind) for index, kind in enumerate(kinds)), 10 * len(kinds))
    with caplog.at_level(logging.WARNING):
        warn_of_early_end(plan, step)
    assert said in warnings(caplog)[0]
