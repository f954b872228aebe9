"""Whose turn it is, where the run decides: the greatest need of those that have had none in this round."""

import json

import pytest

from hf_drt import Schedule
from hf_drt.schedule import Run, Turns, could_become, provisional

NEEDS = [{1: 0.1, 2: 0.5, 3: 0.3}, {1: 0.4, 2: 0.9, 3: 0.4}, {1: 0.0, 2: 0.9, 3: 0.9}, {1: 0.1, 2: 0.2, 3: 0.7}]


def plan_of(text: str, steps: int = 100):
    return Schedule.parse(text).resolve(Run(steps))


def decided(text: str, needs=None, steps: int = 100):
    """The plan at the end of a run, and what was decided."""
    turns, plan, left = Turns(), plan_of(text, steps), list(needs or NEEDS)
    for index in range(len(plan)):
        plan = turns.decide(plan, index, lambda count: left.pop(0))
    return plan, turns


def test_the_group_with_the_greatest_need_is_next_and_each_has_one_turn_a_round():
    plan, turns = decided("rotate(groups=3,order=need,share=90,rounds=2)", [*NEEDS[:3], *NEEDS[:3]])
    # 2 is the neediest; then 1 and 3 are equal, and the first is taken; 3 is left. In the second round 2 again.
    assert [row["group"] for row in turns.trace] == [2, 1, 3, 2, 1, 3]
    assert [str(phase.form) for phase in plan.phases[1:4]] == [
        "dense[2/3]",
        "dense[1/3]+frozen[2/3]",
        "dense[3/3]+frozen[1/3]",
    ]
    assert [(row["step"], row["phase"]) for row in turns.trace[:2]] == [(10, 1), (25, 2)]
    assert turns.trace[0]["needs"] == {"1": 0.1, "2": 0.5, "3": 0.3}


def test_a_new_round_does_not_begin_with_the_group_that_the_same_phase_freezes():
    plan, turns = decided("rotate(groups=3,order=need,share=90,rounds=2)", [*NEEDS[:3], NEEDS[3], *NEEDS[:2]])
    assert [row["group"] for row in turns.trace] == [2, 1, 3, 2, 3, 1]  # not 3, the neediest, whose turn is just over
    assert plan.phases[4].form == "dense[2/3]+frozen[3/3]"


def test_without_another_form_in_the_phase_a_round_may_begin_with_the_group_of_the_last_turn():
    text = "factored@0 dense[next/2]@10 dense[next/2]@20 dense[next/2]@30"
    _, turns = decided(text, [{1: 1.0, 2: 0.0}, {1: 1.0, 2: 0.0}, {1: 0.0, 2: 1.0}])
    assert [row["group"] for row in turns.trace] == [1, 2, 2]


def test_last_is_the_turn_before_in_the_same_division_and_no_decision():
    text = "factored@0 dense[next/2]@10 dense[3/4]@20 frozen[last/2]@30 frozen[last/4]@40"
    plan, turns = decided(text, [{1: 0.0, 2: 1.0}])
    assert [phase.form for phase in plan.phases[3:]] == ["frozen[2/2]", "frozen[3/4]"]
    assert len(turns.trace) == 1


def test_rounds_of_different_divisions_are_counted_apart():
    text = "factored@0 dense[next/2]@10 dense[next/3]@20 dense[next/2]@30 dense[next/3]@40 dense[next/3]@50"
    high = {1: 2.0, 2: 1.0, 3: 0.0}
    plan, _ = decided(text, [high] * 5)
    assert [phase.form for phase in plan.phases[1:]] == [
        "dense[1/2]", "dense[1/3]", "dense[2/2]", "dense[2/3]", "dense[3/3]",
    ]  # fmt: skip


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("groups", [2, 3, 5])
def test_a_provisional_plan_has_the_turns_in_ascending_order(groups, rounds):
    need = plan_of(f"rotate(groups={groups},order=need,rounds={rounds})", 1000)
    assert provisional(need) == plan_of(f"rotate(groups={groups},rounds={rounds})", 1000)
    assert provisional(provisional(need)) == provisional(need)


def test_what_a_plan_can_become():
    open_, text = plan_of("rotate(groups=3,order=need,share=90)"), "rotate(groups=3,order=need,share=90)"
    turns, plan = Turns(), plan_of(text)
    for index in range(len(plan)):
        plan = turns.decide(plan, index, lambda count: NEEDS[0])
        assert could_become(open_, plan)
        assert could_become(open_, plan_of(str(plan)))
    assert not could_become(plan, open_)
    for other in (
        plan_of("rotate(groups=3,order=need,share=80)"),
        plan_of("rotate(groups=3,order=need,share=90)", 200),
        plan_of("rotate(groups=4,order=need,share=90)"),
        plan_of("rotate(groups=3,order=need,share=90,after=factored)"),
        plan_of("rotate(groups=3,order=need,share=90,rounds=2)"),
        plan_of("factored@0 dense[1/4]@10 dense[2/4]+frozen[1/4]@40 dense[3/4]+frozen[2/4]@70"),
    ):
        assert not could_become(open_, other)


def test_the_trace_survives_json():
    _, turns = decided("rotate(groups=3,order=need,share=90)")
    turns.reference = {"a": 3.5}
    again = Turns()
    again.load_state_dict(json.loads(json.dumps(turns.state_dict())))
    assert (again.trace, again.reference) == (turns.trace, turns.reference)
