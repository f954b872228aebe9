"""Counts of update steps that come by hand, and the types of DynamicRank's other arguments."""

import numpy as np
import pytest
import tiny

from hf_drt import DRTConfig, DynamicRank, Phase, Plan, Run, Schedule
from hf_drt.schedule import whole_number

TEXT = "factored@0 dense@50%"
CONFIG = DRTConfig(schedule=TEXT, rank=4)
WRONG = pytest.mark.parametrize("value", ["100", 100.0, True, [100]], ids=repr)


def drt():
    return DynamicRank(tiny.llama(), CONFIG, 20)


@WRONG
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("max_steps", lambda value: DynamicRank(tiny.llama(), CONFIG, value)),
        ("max_steps", lambda value: DynamicRank(tiny.llama(), CONFIG, plan=drt().plan, max_steps=value)),
        ("max_steps", lambda value: Run(value)),
        ("max_steps", lambda value: Plan((Phase(0, "dense"),), value)),
        ("the start of a dense phase", lambda value: Plan((Phase(0, "factored"), Phase(value, "dense")), 200)),
        ("step", lambda value: drt().begin_step(value)),
        ("step", lambda value: drt().apply(value)),
        ("step", lambda value: drt().match(value)),
        ("step", lambda value: drt().observe(value)),
        ("step", lambda value: drt().plan.index_at(value)),
    ],
)
def test_a_count_that_is_no_whole_number_is_refused(name, use, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of update steps, got .*, a"):
        use(value)


def test_a_count_that_is_missing_or_zero_is_refused():
    with pytest.raises(ValueError, match=r"max_steps must be a whole number of update steps, got None, a NoneType"):
        Run(None)
    with pytest.raises(ValueError, match=r"needs either a plan, or config\.schedule and max_steps"):
        DynamicRank(tiny.llama(), CONFIG, None)
    for steps in (0, -5):
        with pytest.raises(ValueError, match=rf"never trains: the run has {steps} update steps"):
            DynamicRank(tiny.llama(), CONFIG, steps)


def test_integers_of_numpy_are_whole_numbers():
    assert whole_number("steps", np.int64(7)) == 7
    assert DynamicRank(tiny.llama(), CONFIG, np.int64(20)).plan == drt().plan
    assert type(DynamicRank(tiny.llama(), CONFIG, np.int64(20)).plan.max_steps) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps_per_epoch": "10"}, r"steps_per_epoch must be a number above 0, or None, got '10'"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch must be a number above 0, or None, got 0"),
        ({"budget": 40}, r"budget must be in \(0, 1\], or None, got 40\. It is a share"),
        ({"budget": "0.4"}, r"budget must be in \(0, 1\], or None, got '0\.4'"),
        ({"lr": [1.0, 0.5]}, r"lr must be a function that returns the learning rate of every update step, got \[1\.0"),
    ],
)
def test_the_other_numbers_of_a_run_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Run(20, **values)


def test_a_schedule_s_text_is_a_configuration():
    made = DynamicRank(tiny.llama(), TEXT, max_steps=20)
    assert made.config == DRTConfig(schedule=TEXT).settled("factored")
    assert made.plan == Schedule.parse(TEXT).resolve(Run(20))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((tiny.llama(), {"schedule": TEXT}, 20), TypeError, r"drt settings must be a DRTConfig, or a schedule's text"),
        ((tiny.llama(), None, 20), TypeError, r"drt settings must be a DRTConfig, or a schedule's text.*got None"),
        ((tiny.llama(), "factred@0", 20), ValueError, r"'factred' in 'factred@0' is not a form"),
        (("llama", TEXT, 20), TypeError, r"model must be an nn\.Module, got 'llama'\. Pass the model itself"),
    ],
)
def test_other_types_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DynamicRank(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"plan": TEXT}, TypeError, r"plan must be a Plan, a ResolvedPlan or None, got 'factored@0 .*resolve\(Run\("),
        ({"plan": Plan((Phase(0, "factored"),), 20), "trigger": "fixed"}, TypeError, r"trigger must be a Trigger"),
        ({"max_steps": 20, "seed": "1"}, ValueError, r"seed must be a whole number of at least 0, got '1'"),
        ({"max_steps": 20, "seed": -1}, ValueError, r"seed must be a whole number of at least 0, got -1"),
        ({"plan": Plan((Phase(0, "factored"),), 20), "max_steps": 30}, ValueError, r"max_steps is 30, but the plan is"),
    ],
)  # fmt: skip
def test_keywords_of_other_types_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        DynamicRank(tiny.llama(), TEXT, **keywords)
