"""Phases of groups of layers: the grammar, what is refused, and the timeline by group."""

import random

import pytest

from hf_drt import Phase, Plan, Schedule
from hf_drt.schedule import LETTERS, Group, Part, Run, spans, timelines
from hf_drt.schedule.rotation import AFTER, ORDERS

EIGHT = "factored@0 dense[1/2]@50 dense[2/2]+frozen[1/2]@70"


def plan_of(text: str, steps: int = 100, lowrank: str = "factored") -> Plan:
    return Schedule.parse(text).resolve(Run(steps), lowrank)


@pytest.mark.parametrize(
    "text",
    [
        "factored@0 dense[1/8]@70% dense[2/8]+frozen[1/8]@74%",
        "lowrank@0 dense[next/8]@70% dense[next/8]+lowrank[last/8]@74% frozen[last/8]@90%",
        "dense@0 factored:0.25[1/2]@50% adapter:8[2/2]+frozen[1/2]@60% dense@80%",
        "factored@0 frozen@50% dense@1ep",
        "adapter@0 dense[1/2]+dense[2/2]@lr<0.5",
        "factored@0 dense[1/2]@10% dense[3/4]@20%",
    ],
)
def test_a_schedule_with_groups_is_written_as_it_was_read(text):
    assert str(Schedule.parse(text)) == text
    assert Schedule.parse(str(Schedule.parse(text))) == Schedule.parse(text)


def test_a_plan_with_groups_is_read_again_from_its_text():
    text = "lowrank@0 dense[next/3]@10% lowrank:0.25[last/3]+dense[next/3]@20% frozen@90%"
    plan = plan_of(text, lowrank="adapter")
    assert str(plan) == "adapter@0 dense[next/3]@10 adapter:0.25[last/3]+dense[next/3]@20 frozen@90"
    assert plan_of(str(plan)) == plan
    assert [phase.kind for phase in plan.phases] == ["adapter", "mixed", "mixed", "frozen"]
    assert plan.phases[2].kinds == ("adapter", "dense")
    assert plan.phases[2].parts[1] == Part("dense", None, Group("next", 3))
    assert plan.phases[3].whole == (Part("frozen"),)


TEXTS = [
    ("factored@0 dense[1]@9", r"'\[1\]' in 'dense\[1\]@9' is not a group; write its number and their count, e\.g\. \["),
    ("factored@0 dense[]@9", r"'\[\]' in 'dense\[\]@9' is not a group"),
    ("factored@0 dense[-1/8]@9", r"'\[-1/8\]' in .* is not a group; .* or \[next/8\] or \[last/8\]"),
    ("factored@0 dense[first/8]@9", r"'\[first/8\]' in 'dense\[first/8\]@9' is not a group"),
    ("factored@0 dense[1/8@9", r"'dense\[1/8' in 'dense\[1/8@9' is not a form; allowed are dense, .*, frozen"),
    ("factored@0 dense[1/2][2/2]@9", r"is not a form; allowed are"),
    ("factored@0 dense[0/8]@9", r"'\[0/8\]' is not a group: there must be 2 or more, numbered from 1 to their count"),
    ("factored@0 dense[9/8]@9", r"'\[9/8\]' is not a group"),
    ("factored@0 dense[1/1]@9", r"'\[1/1\]' is not a group: there must be 2 or more"),
    ("factored@0 dense[next/1]@9", r"'\[next/1\]' is not a group: there must be 2 or more"),
    ("factored@0 dense:8[1/2]@9", r"'dense:8\[1/2\]@9' gives a rank to the dense form, which has none; leave ':8' out"),
    ("factored@0 frozen:8@9", r"'frozen:8@9' gives a rank to the frozen form, which has none"),
    ("factored@0 factored:x[1/2]@9", r"'x' in 'factored:x\[1/2\]@9' is not a rank"),
    ("factored@0 dense+frozen[1/2]@9", r"'dense\+frozen\[1/2\]@9' has a part without a group; write each with its own"),
    ("factored@0 dense+frozen@9", r"'dense\+frozen@9' has a part without a group"),
    ("factored@0 dense[1/2]+@9", r"'' in 'dense\[1/2\]\+@9' is not a form"),
    ("factored@0 dense[1/2]+frozen[1/2]@9", r"must be different groups of one division into so many, e\.g\. dense\["),
    ("factored@0 dense[1/2]+frozen[3/4]@9", r"the parts of 'dense\[1/2\]\+frozen\[3/4\]@9' must be different groups o"),
    ("factored@0 frozen[next/2]@9", r"'frozen\[next/2\]@9' has 'next' in another form than dense; .*: dense\[next/8\]"),
    ("factored@0 dense[next/2]+frozen[1/2]@9", r"groups by number beside one that the run decides, which may turn out"),
    ("factored@0 dense[1/2]@5 dense[2/2]+frozen[last/2]@9", r"by number beside one that the run decides.* 'next' and"),
    ("factored@0 dense[1/2]+factored:budget[2/2]@9", r"leaves the rank of a group to the budget, which decides that o"),
    ("dense[1/2]@0", r"the first phase must bring all layers into a form that is trained, got 'dense\[1/2\]@0'\. Begi"),
    ("frozen@0 dense@9", r"the first phase must bring all layers into a form .*, got 'frozen@0'\. .* lowrank@0 frozen"),
    ("lowrank:budget@0 dense[1/2]@9", r"'dense\[1/2\]@9' brings a group of layers into a form, and a budget decides r"),
    ("factored@0 dense[1/2]@budget", r"a budget decides ranks and boundaries of whole phases alone, .*Write the rank"),
    ("rotate(groups=1)", r"preset option groups must be at least 2, got 1"),
    ("rotate(share=0)", r"preset option share must be in \(0, 100\), in % of the run, got 0"),
    ("rotate(share=100)", r"preset option share must be in \(0, 100\), in % of the run, got 100"),
    ("rotate(order=up)", r"preset option order must be ascending or descending or random or need, got up"),
    ("rotate(after=dense)", r"preset option after must be frozen or adapter or lowrank or factored, got dense"),
    ("rotate(rounds=0)", r"preset option rounds must be at least 1, got 0"),
    ("rotate(seed=1)", r"preset option seed must be left out but for order=random, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_schedule_with_groups_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


PLANS = [
    ("factored@0 frozen[last/2]@9", r"'frozen\[last/2\]@9' is of the group of the last turn, and there was none of 2"),
    ("factored@0 dense[1/4]@5 frozen[last/2]@9", r"there was none of 2 groups before it, in 'factored@0 dense\[1/4\]@"),
    ("factored@0 dense[next/2]+frozen[last/2]@9", r"is of the group of the last turn, and there was none"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), PLANS)
def test_a_plan_whose_last_turn_has_not_been_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        plan_of(text)


def test_a_plan_by_hand_is_checked_as_one_that_is_read():
    one = Part("dense", None, Group(1, 2))
    with pytest.raises(
        ValueError, match=r"a phase has parts if and only if its kind is 'mixed', got 'dense' and parts '"
    ):
        Phase(5, "dense", None, (one,))
    with pytest.raises(
        ValueError, match=r"a phase has parts if and only if its kind is 'mixed', got 'mixed' and parts '"
    ):
        Phase(5, "mixed")
    with pytest.raises(ValueError, match=r"must be different groups"):
        Phase(5, "mixed", None, (one, one))
    with pytest.raises(ValueError, match=r"must bring all layers into a form that is trained, .*Begin with factored@0"):
        Plan((Phase(0, "mixed", None, (one,)),), 10)
    with pytest.raises(ValueError, match=r"must bring all layers into a form that is trained"):
        Plan((Phase(0, "frozen"),), 10)
    with pytest.raises(ValueError, match=r"was none of 2 groups before it"):
        Plan((Phase(0, "dense"), Phase(5, "mixed", None, (Part("frozen", None, Group("last", 2)),))), 10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("rounds", [1, 3])
def test_in_each_round_of_the_preset_every_group_has_one_turn_of_equal_length(order, after, rounds):
    plan = plan_of(f"rotate(groups=4,share=40,order={order},after={after},rounds={rounds})", 1200)
    kind = "factored" if after == "lowrank" else after
    turns = [next(part.group.number for part in phase.parts if part.kind == "dense") for phase in plan.phases[1:]]
    for index in range(rounds):
        expected = ["next"] * 4 if order == "need" else [1, 2, 3, 4]
        assert sorted(turns[4 * index : 4 * index + 4]) == expected
    lengths = {plan.end_of(index) - phase.start for index, phase in enumerate(plan.phases)}
    assert lengths == {720, 480 // (4 * rounds)}
    for number, phase in zip(turns, plan.phases[2:], strict=False):
        done = [part for part in phase.parts if part.kind != "dense"]
        again = phase.parts[0].group.number == number != "next"
        assert done == ([] if again else [Part(kind, None, Group("last" if order == "need" else number, 4))])


def test_the_orders_of_the_preset():
    def turns(order: str) -> list:
        return [phase.parts[0].group.number for phase in plan_of(f"rotate(groups=5,rounds=2,{order})", 1000).phases[1:]]

    assert turns("order=ascending") == [1, 2, 3, 4, 5] * 2
    assert turns("order=descending") == [5, 4, 3, 2, 1] * 2
    first = [1, 2, 3, 4, 5]
    random.Random(3).shuffle(first)
    assert turns("order=random,seed=3")[:5] == first
    assert turns("order=random,seed=3") != turns("order=random,seed=4")
    assert turns("order=random,seed=3")[5:] == turns("order=random,seed=4")[:5] != first


def test_the_timeline_has_a_row_per_group():
    rows = spans(plan_of(EIGHT))
    assert {name: [(s.kind, s.start, s.end) for s in row] for name, row in rows.items()} == {
        "group 1/2": [("factored", 0, 50), ("dense", 50, 70), ("frozen", 70, 100)],
        "group 2/2": [("factored", 0, 70), ("dense", 70, 100)],
    }
    assert timelines(rows, 10, LETTERS).splitlines() == [
        "group 1/2  .....##---",
        "group 2/2  .......###",
        ". factored  # dense  - frozen  over 100 update steps",
    ]


def test_a_timeline_of_several_divisions_is_that_of_all_layers():
    plan = plan_of("factored@0 dense[1/2]@50 dense[1/3]@60 frozen@80")
    assert [(s.kind, s.start, s.end) for s in spans(plan)[""]] == [
        ("factored", 0, 50),
        ("mixed", 50, 80),
        ("frozen", 80, 100),
    ]
    assert timelines(spans(plan), 10, LETTERS).splitlines() == [
        ".....~~~--  100 update steps",
        ". factored  ~ mixed  - frozen",
    ]


def test_a_timeline_whose_turns_the_run_decides_shows_them_in_ascending_order():
    rows = spans(plan_of("factored@0 dense[next/2]@50 dense[next/2]+frozen[last/2]@70"))
    assert rows == spans(plan_of(EIGHT))
