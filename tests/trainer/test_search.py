"""Settings have one source: values of a hyperparameter search that would not reach the run are refused."""

import pytest
import tiny
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_drt import DRTConfig, DRTTrainer, Factored, form_of, run

SHORT = {"max_steps": 1, "gradient_accumulation_steps": 1}


def searching(folder, space, arguments=None, backend=HPSearchBackend.OPTUNA, **settings):
    """A trainer as ``hyperparameter_search`` leaves it to a backend, which calls ``train(trial=...)``."""
    plan = {"drt_schedule": "factored@0", "drt_rank": 4, "drt_export": "native"}
    arguments = arguments or tiny.arguments(folder, **plan, **SHORT)
    trainer = DRTTrainer(args=arguments, train_dataset=tiny.dataset(), model_init=lambda: tiny.llama(), **settings)
    trainer.hp_search_backend, trainer.hp_space = backend, space
    return trainer


class Trial:
    """What the trainer asks of Optuna's."""

    params = number = None


def test_a_search_over_the_arguments_trains_what_it_asks_for(tmp_path):
    trainer = searching(tmp_path, lambda trial: {"drt_rank": 6}, backend=HPSearchBackend.WANDB)
    for rank in (6, 2):
        trainer._hp_search_setup({"drt_rank": rank})
        trainer.train()
        assert {form_of(trainer.model.get_submodule(name)) for name in trainer.drt.targets} == {Factored(rank)}
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer._hp_search_setup(Trial())
    assert trainer.args.drt_rank == 6


@pytest.mark.parametrize("backend", [HPSearchBackend.OPTUNA, HPSearchBackend.WANDB])
def test_a_trial_has_nothing_of_the_trials_before_it(tmp_path, backend):
    """A search whose choices depend on each other: a rank of its own, or a share."""
    trials = [{"drt_rank": 6}, {"drt_rank": None, "drt_rank_ratio": 0.5}, {"drt_schedule": "lowrank@0"}, {}]
    trainer = searching(tmp_path, lambda trial: trials[trial.number], backend=backend)

    def begin(number: int) -> tuple:
        trial = Trial()
        trial.number = number
        trainer._hp_search_setup(trial if backend == HPSearchBackend.OPTUNA else trials[number])
        return trainer.args.drt_rank, trainer.args.drt_rank_ratio, trainer.args.drt_schedule

    assert begin(0) == (6, 0.25, "factored@0")
    assert begin(1) == (None, 0.5, "factored@0")
    assert begin(2) == (4, 0.25, "lowrank@0")
    assert begin(3) == (4, 0.25, "factored@0")
    begin(0)
    trainer.args.drt_rank = 3  # by hand, between two searches
    assert begin(3) == (3, 0.25, "factored@0")
    trials[3] = {"drt_rank": 6, "max_steps": "many"}  # which the Trainer cannot cast
    with pytest.raises(ValueError, match="many"):
        begin(3)
    assert trainer.args.drt_rank == 3


@pytest.mark.parametrize("backend", [HPSearchBackend.OPTUNA, HPSearchBackend.WANDB])
@pytest.mark.parametrize(
    ("made", "values", "message"),
    [
        ({"drt": DRTConfig(schedule="factored@0")}, {"drt_rank": 6}, r"over drt_rank would .* takes it from drt="),
        ({"drt": DRTConfig(schedule="factored@0")}, {"drt_schedule": "fixed"}, r"over drt_schedule would have no"),
        ({"drt": "factored@0"}, {"drt_schedule": "fixed"}, r"over drt_schedule would .*: the trainer takes"),
        ({}, {"drt_schedule": "fixed"}, r"over drt_schedule would .* made without a schedule, .*plainly"),
        ({}, {"drt_rnk": 6}, r"over drt_rnk would have no effect: DRTTrainingArguments has no such field"),
    ],
)  # fmt: skip
def test_values_that_would_not_reach_the_run_are_refused(tmp_path, backend, made, values, message):
    arguments = tiny.arguments(tmp_path, drt_schedule=None, **SHORT)
    trainer = searching(tmp_path, lambda trial: values, arguments, backend, **made)
    before = arguments.to_dict()
    with pytest.raises(ValueError, match=message):
        trainer.train(trial=Trial() if backend == HPSearchBackend.OPTUNA else dict(values))
    assert arguments.to_dict() == before
    assert trainer.hp_space(None) == values


def test_arguments_without_the_fields_are_named(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = searching(tmp_path, lambda trial: {"drt_rank": 6}, arguments, drt=DRTConfig(schedule="factored@0"))
    with pytest.raises(ValueError, match=r"TrainingArguments has no such field\. Use DRTTrainingArguments"):
        trainer.train(trial=Trial())


def test_a_search_under_hf_drt_run_is_refused(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule=None, **SHORT)
    with run.dynamic_rank_trainers(DRTConfig(schedule="factored@0", rank=4)):
        trainer = searching(tmp_path, lambda trial: {"drt_rank": 6}, arguments)
        with pytest.raises(ValueError, match=r"over drt_rank would have no effect: .* or from hf_drt\.run"):
            trainer.train(trial=Trial())


def test_a_searched_value_that_the_plan_does_not_use_is_refused_before_the_model_changes(tmp_path):
    trainer = searching(tmp_path, None, backend=HPSearchBackend.WANDB)
    trainer._hp_search_setup({"drt_rank": 6, "drt_adapter_lr_scale": 5.0})
    with pytest.raises(ValueError, match=r"adapter_lr_scale is 5\.0, and would have no effect"):
        trainer.train()
    assert trainer.model.state_dict().keys() == tiny.llama().state_dict().keys()


# ---- without a search


def test_drt_and_different_arguments_are_refused(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule="paper")
    with pytest.raises(ValueError, match=r"holds all settings, so that the drt_\* settings .*drt_schedule='paper'"):
        DRTTrainer(tiny.llama(), arguments, train_dataset=tiny.dataset(), drt=DRTConfig(schedule="fixed"))
    with pytest.raises(ValueError, match=r"drt='fixed' is the schedule, so that drt_schedule='paper'"):
        DRTTrainer(tiny.llama(), arguments, train_dataset=tiny.dataset(), drt="fixed")
    equal = DRTConfig.from_prefixed(arguments)
    DRTTrainer(tiny.llama(), arguments, train_dataset=tiny.dataset(), drt=equal)


@pytest.mark.parametrize(("before", "after"), [(None, "fixed"), ("fixed", None)])
def test_a_schedule_that_comes_or_goes_after_the_trainer_was_made_is_refused(tmp_path, before, after):
    trainer = tiny.trainer(tmp_path, drt_schedule=before)
    trainer.args.drt_schedule = after
    trainer.args.drt_rank_multiple = 8
    was = "off" if before is None else "on"
    with pytest.raises(
        ValueError, match=rf"was {was} when this trainer was made, and the schedule has become {after!r}"
    ):
        trainer.train()
