"""From one line of text to update steps: reading, writing, and resolving against a run."""

from fractions import Fraction
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import Dense, Factored
from hf_drt.planning import is_query_or_key
from hf_drt.schedule import PRESETS, Boundary, Entry, Phase, Plan, Run, Schedule, lr_drops
from hf_drt.trainer.lr import existing_curve, simulated_curve

reproducibly = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def plan_of(text: str, max_steps: int = 1000, lowrank: str = "factored", **run) -> Plan:
    return Schedule.parse(text).resolve(Run(max_steps, **run), lowrank)


def starts(text: str, max_steps: int = 1000, **run) -> list[int]:
    return [phase.start for phase in plan_of(text, max_steps, **run).phases]


# ---- a boundary that a budget decides


@reproducibly
@given(
    budget=st.floats(0.01, 1.0),
    low=st.floats(0.05, 0.9),
    steps=st.integers(10, 5000),
    text=st.sampled_from(
        [
            "factored@0 dense@budget",
            "dense@0 factored@budget",
            "factored@0 dense@budget factored@80%",
            "factored@0 dense@30% factored@budget",
            "factored@0 dense@20% factored@40% dense@budget adapter@90%",
        ]
    ),
)
def test_a_budget_is_met_and_a_step_further_would_exceed_it(budget, low, steps, text):
    costs = {"dense": 1.0, "factored": low, "adapter": 2 / 3 + low / 3}

    def average(plan: Plan) -> float:
        return sum(costs[p.kind] * (plan.end_of(i) - p.start) for i, p in enumerate(plan.phases)) / plan.max_steps

    try:
        plan = plan_of(text, steps, budget=budget, cost=lambda kind, rank: costs[kind])
    except ValueError:
        return  # out of reach: the messages have their own tests
    assert average(plan) <= budget + 1e-9
    index = next(i for i, entry in enumerate(Schedule.parse(text).entries) if entry.at.unit == "budget")
    dearer = -1 if plan.phases[index].kind == "dense" else 1
    phases = list(plan.phases)
    phases[index] = Phase(phases[index].start + dearer, phases[index].kind, phases[index].rank)
    try:
        wider = Plan(tuple(phases), steps)
    except ValueError:
        return  # the phase beside it would be empty
    assert average(wider) > budget


@pytest.mark.parametrize(
    ("budget", "plan"),
    [
        (0.6, "factored:0.25@0 dense@80"),  # 0.5 (1 - w) + w = 0.6
        (0.5, "factored:0.1875@0 dense@80"),  # a rank of 1/4 would cost 0.5, and leave nothing for full rank
        (0.3, "factored:0.0625@0 dense@80"),  # 0.125 (1 - w) + w = 0.3; 1/8 would leave 0.067
    ],
)
def test_auto_late_fits_rank_and_window_to_the_budget(budget, plan):
    cost = {"dense": lambda rank: 1.0, "factored": lambda rank: 2 * rank}
    assert str(plan_of("auto_late", 100, budget=budget, cost=lambda kind, rank: cost[kind](rank))) == plan


@pytest.mark.parametrize(
    ("budget", "rank"), [(0.6, 0.25), (0.5, 0.25), (0.3, 0.140625), (0.25, 0.125), (0.249, 0.109375), (0.0625, 0.03125)]
)
def test_without_a_dense_phase_the_rank_may_cost_the_whole_budget(budget, rank):
    for text in ("auto", "lowrank:budget@0", "factored:budget@0 factored:budget@50"):
        plan = plan_of(text, 100, budget=budget, cost=lambda kind, rank: 2 * rank)
        assert {phase.rank for phase in plan.phases} == {rank}
        assert {phase.kind for phase in plan.phases} == {"factored"}


def test_where_lowrank_means_adapters_auto_is_auto_late():
    auto, late = Schedule.parse("auto"), Schedule.parse("auto_late")
    assert auto.where("adapter") == late
    assert str(auto.where("factored")) == "lowrank:budget@0"
    assert (auto.kinds("factored"), auto.kinds("adapter")) == (["factored"], ["adapter", "dense"])
    run = Run(100, budget=0.9, cost=lambda kind, rank: 1.0 if kind == "dense" else 2 / 3 + 2 * rank)
    assert auto.resolve(run, "adapter") == late.resolve(run, "adapter")
    assert auto.outline(run, "adapter") == late.outline(run, "adapter")
    assert (auto.uses_budget, auto.budget_chooses_rank, auto.writes_lowrank, auto.uses_lr) == (True, True, True, False)


def test_a_budget_in_a_model():
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="auto_late", budget=0.5, rank_multiple=1), max_steps=1000)
    assert drt.plan.phases[1].kind == "dense"
    assert 0.498 < drt.cost().flops <= 0.5


# ---- query and key projections


def dense_in(config: DRTConfig, model=None) -> set[str]:
    """Leaves that stay dense in the first phase."""
    forms = DynamicRank(model or tiny.llama(), config, max_steps=100).forms(0)
    return {name.rpartition(".")[2] for name, form in forms.items() if form == Dense()}


@pytest.mark.parametrize(
    ("schedule", "settings", "kept"),
    [
        ("auto_late", {"budget": 0.5}, True),
        ("auto", {"budget": 0.5}, False),
        ("auto", {"budget": 0.5, "dense_query_key": True}, True),
        ("lowrank:budget@0 dense@budget", {"budget": 0.5}, True),
        ("factored@0 dense@budget", {"budget": 0.5, "rank_ratio": 0.0625}, False),  # it chooses a boundary alone
        ("paper", {"rank_ratio": 0.0625}, False),
        ("fixed", {"rank_ratio": 0.0625, "dense_query_key": True}, True),
        ("auto_late", {"budget": 0.5, "dense_query_key": False}, False),
    ],
)
def test_query_and_key_stay_dense_where_the_budget_chooses_the_rank(schedule, settings, kept):
    config = DRTConfig(schedule=schedule, rank_multiple=1, **settings)
    assert dense_in(config) == ({"q_proj", "k_proj"} if kept else set())


def test_query_and_key_take_part_in_adapter_phases_and_follow_rank_pattern():
    assert dense_in(DRTConfig(schedule="adapter@0 factored@50%", dense_query_key=True, rank=2)) == set()
    pattern = {"layers.0.self_attn.q_proj": 2}
    config = DRTConfig(schedule="fixed", dense_query_key=True, rank=2, rank_pattern=pattern)
    forms = DynamicRank(tiny.llama(), config, max_steps=100).forms(0)
    assert forms["model.layers.0.self_attn.q_proj"] == Factored(2)
    assert forms["model.layers.1.self_attn.q_proj"] == Dense()


def test_a_phase_that_query_and_key_leave_dense_is_refused():
    config = DRTConfig(schedule="fixed", dense_query_key=True, rank=2, include=["q_proj"])
    with pytest.raises(ValueError, match=r"leaves all 2 layers dense: they are query .* Set dense_query_key to False"):
        DynamicRank(tiny.llama(), config, max_steps=100)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("bert.encoder.layer.0.attention.self.key", True),
        ("encoder.block.0.layer.0.SelfAttention.k", True),
        ("distilbert.transformer.layer.0.attention.k_lin", True),
        ("model.layers.0.self_attn.q_b_proj", True),
        ("model.layers.0.self_attn.v_proj", False),
        ("model.layers.0.self_attn.kv_a_proj", False),
        ("transformer.h.0.attn.c_attn", False),  # holds the values too
        ("gpt_neox.layers.0.attention.query_key_value", False),
        ("rwkv.blocks.0.feed_forward.key", False),  # no attention
    ],
)
def test_which_layers_are_query_or_key(name, answer):
    assert is_query_or_key(name) is answer


# ---- learning-rate curves, from their formulas


def stepwise(steps: int, *drops: int, by: float = 0.1, warmup: int = 0) -> list[float]:
    """1, times ``by`` at every drop, after a linear warm-up."""
    return [min(1.0, (k + 1) / (warmup + 1)) * by ** sum(k >= drop for drop in drops) for k in range(steps)]


def warmup_then_linear(steps: int, warmup: int) -> list[float]:
    return [k / warmup if k < warmup else (steps - k) / (steps - warmup) for k in range(steps)]


def cosine(steps: int) -> list[float]:
    return [(1 + float(torch.cos(torch.tensor(torch.pi * k / steps, dtype=torch.float64)))) / 2 for k in range(steps)]


# ---- reading and writing

WRITTEN = {
    "factored@0": [("factored", None, "share steps", 0)],
    "factored@0 dense@40% adapter@80%": [
        ("factored", None, "steps", 0),
        ("dense", None, "share", 40.0),
        ("adapter", None, "share", 80.0),
    ],
    "lowrank:16@0 dense@400 factored:0.25@800": [
        ("lowrank", 16, "steps", 0),
        ("dense", None, "steps", 400),
        ("factored", 0.25, "steps", 800),
    ],
    "dense@0 adapter:1.0@1.5ep": [("dense", None, "steps", 0), ("adapter", 1.0, "epochs", 1.5)],
    "factored@0% dense@lr>0.5 factored@lr<0.25": [
        ("factored", None, "share", 0.0),
        ("dense", None, "lr_above", 0.5),
        ("factored", None, "lr_below", 0.25),
    ],
    "lowrank@0 dense@I adapter@D": [
        ("lowrank", None, "steps", 0),
        ("dense", None, "paper", "I"),
        ("adapter", None, "paper", "D"),
    ],
    "factored:64@0 factored:32@50%": [("factored", 64, "steps", 0), ("factored", 32, "share", 50.0)],
}
written = pytest.mark.parametrize(("text", "phases"), WRITTEN.items(), ids=WRITTEN.keys())


@written
def test_a_schedule_is_read_phase_by_phase(text, phases):
    entries = Schedule.parse(text).entries
    assert [(e.kind, e.rank, e.at.value) for e in entries] == [(kind, rank, value) for kind, rank, _, value in phases]
    assert all(entry.at.unit in unit.split() for entry, (_, _, unit, _) in zip(entries, phases, strict=True))
    assert [type(e.rank) for e in entries] == [type(rank) for _, rank, _, _ in phases]


@written
def test_a_schedule_is_written_as_it_was_read(text, phases):
    assert str(Schedule.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  factored@0\n\tdense@40%  ", "factored@0 dense@40%"),
        ("factored@0 dense@400steps", "factored@0 dense@400"),
        ("factored@0 dense@1step", "factored@0 dense@1"),
        ("factored@0 dense@40.0%", "factored@0 dense@40%"),
        ("factored@0 dense@007", "factored@0 dense@7"),
        ("factored@0 dense@lr<.5", "factored@0 dense@lr<0.5"),
        ("factored@0 dense@2.0ep", "factored@0 dense@2ep"),
        ("factored:0.250@0", "factored:0.25@0"),
        ("paper", "lowrank@0 dense@I adapter@D"),
        (" paper ( final = factored ) ", "lowrank@0 dense@I factored@D"),
        ("paper()", "lowrank@0 dense@I adapter@D"),
        ("fixed", "lowrank@0"),
        ("warmup", "dense@0 lowrank@40%"),
        ("warmup(until=12.5)", "dense@0 lowrank@12.5%"),
        ("cyclic", "lowrank@0 dense@15% lowrank@35% dense@65% lowrank@85%"),
        ("decay(first=0.5, last=0.25, stages=2)", "factored:0.5@0% factored:0.25@50%"),
    ],
)
def test_what_may_be_written_in_several_ways_is_written_in_one(text, plain):
    assert str(Schedule.parse(text)) == plain
    assert Schedule.parse(text) == Schedule.parse(plain)


OPTIONS = [
    "paper", "paper(final=factored)", "paper_conv", "paper_conv(ratio=0.25)", "fixed", "warmup",
    "warmup(until=33.3)", "cyclic", "cyclic(windows=1)",
    "cyclic(windows=7, share=10)", "cyclic(share=99)", "decay", "decay(stages=9)", "decay(shape=exponential)",
    "decay(shape=sigmoid, first=1.0, last=0.01)", "auto", "auto_late", "adaptive", "adaptive(signal=rank, drop=0.5)",
    "rotate", "rotate(groups=3, share=12.5, order=random, after=adapter, rounds=2, seed=5)", "rotate(order=need)",
    "drift", "drift(first=0.125, last=0.5, shape=linear)", "drift(shape=sigmoid, steepness=5, midpoint=30, levels=3)",
]  # fmt: skip


def test_every_preset_is_tried():
    assert {text.partition("(")[0] for text in OPTIONS} == set(PRESETS)


@pytest.mark.parametrize("text", OPTIONS)
def test_a_preset_survives_writing_and_reading(text):
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "factored@0 dense@33.3333333%",
        "factored@0 dense@0.00001%",
        "factored@0 dense@12.3456789ep",
        "factored@0 dense@1000000ep",
        "factored@0 dense@lr<0.1234567",
        "factored@0 dense@lr<0.00001",
        "factored:0.00001@0",
        "factored:0.123456789@0",
    ],
)
def test_a_number_survives_writing_and_reading_however_long_it_is(text):
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "warmup(until=0.00001)",
        "cyclic(windows=1, share=99.9999)",
        "cyclic(windows=3, share=0.00001)",
        "decay(last=0.00001)",
        "decay(last=0.0000001)",
    ],
)
def test_every_option_within_its_interval_makes_a_schedule(text):
    assert len(Schedule.parse(text).entries) >= 2


def shares(low: int, high: int) -> st.SearchStrategy[str]:
    """Numbers of at most two decimal places, as text."""
    return st.integers(low * 100, high * 100 - 1).map(lambda n: f"{n / 100:.2f}".rstrip("0").rstrip("."))


BOUNDARIES = st.one_of(
    shares(0, 100).map("{}%".format),
    st.integers(0, 10**9).map(str),
    shares(0, 1000).map("{}ep".format),
    st.integers(1, 999).map(lambda n: f"lr<{n / 1000}"),
    st.integers(1, 999).map(lambda n: f"lr>{n / 1000}"),
    st.sampled_from("ID"),
)
RANKS = st.one_of(
    st.just(""), st.integers(1, 10**6).map(":{}".format), st.integers(1, 1000).map(lambda n: f":{n / 1000}")
)
LOWRANK = st.builds("{}{}@{}".format, st.sampled_from(["factored", "adapter", "lowrank"]), RANKS, BOUNDARIES)
PHASES = st.one_of(LOWRANK, BOUNDARIES.map("dense@{}".format))


def not_dense_twice(phases: list[str]) -> bool:
    return not any(a.startswith("dense") and b.startswith("dense") for a, b in pairwise(phases))


@reproducibly
@given(st.lists(PHASES, min_size=1, max_size=6).filter(not_dense_twice))
def test_any_schedule_survives_writing_and_reading(phases):
    phases[0] = phases[0].partition("@")[0] + "@0"  # the only first boundary that is allowed
    schedule = Schedule.parse(" ".join(phases))
    assert len(schedule.entries) == len(phases)
    assert Schedule.parse(str(schedule)) == schedule


@reproducibly
@given(PHASES)
def test_any_phase_survives_writing_and_reading(text):
    entry = Entry.parse(text)
    assert Entry.parse(str(entry)) == entry
    assert Boundary.parse(str(entry.at)) == entry.at


# ---- plans


@st.composite
def plans(draw) -> Plan:
    max_steps = draw(st.integers(1, 10**6))
    later = draw(st.sets(st.integers(1, max_steps), max_size=5)) - {max_steps}
    kinds = st.sampled_from(["factored", "adapter"])
    ranks = st.one_of(st.none(), st.integers(1, 4096), st.integers(1, 100).map(lambda n: n / 100))
    return Plan(tuple(Phase(start, draw(kinds), draw(ranks)) for start in (0, *sorted(later))), max_steps)


@reproducibly
@given(plans())
def test_a_plan_is_written_as_a_schedule_that_resolves_to_it(plan):
    # The message of a refused resume tells the user to pass exactly this text.
    assert plan_of(str(plan), plan.max_steps) == plan


@reproducibly
@given(plans(), st.data())
def test_every_step_belongs_to_the_phase_that_started_last(plan, data):
    step = data.draw(st.integers(0, plan.max_steps - 1))
    index = plan.index_at(step)
    assert plan.phases[index].start <= step < plan.end_of(index)
    assert len(plan) == len(plan.phases)


def test_phases_cover_the_run_without_a_gap():
    plan = plan_of("factored@0 dense@40% adapter@80%", 10)
    assert [plan.index_at(step) for step in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [plan.end_of(index) for index in range(3)] == [4, 8, 10]
    # After the last update the model is asked about once more, and stays in its last phase.
    assert plan.index_at(10) == 2


@pytest.mark.parametrize(("lowrank", "kinds"), [("factored", "fdf"), ("adapter", "ada")])
def test_lowrank_becomes_what_the_run_says(lowrank, kinds):
    plan = plan_of("lowrank@0 dense@20% lowrank:8@60%", lowrank=lowrank)
    assert "".join(phase.kind[0] for phase in plan.phases) == kinds
    assert [phase.rank for phase in plan.phases] == [None, None, 8]


# ---- shares, steps, epochs


@pytest.mark.parametrize(
    ("text", "run", "expected"),
    [
        ("factored@0 dense@40% adapter@80%", {"max_steps": 1000}, [0, 400, 800]),
        ("factored@0 dense@40% adapter@80%", {"max_steps": 7}, [0, 3, 6]),
        ("factored@0 dense@12.5%", {"max_steps": 1000}, [0, 125]),
        ("factored@0 dense@50%", {"max_steps": 3}, [0, 2]),
        ("factored@0 dense@400", {"max_steps": 401}, [0, 400]),
        ("factored@0 dense@1ep adapter@2.5ep", {"steps_per_epoch": 100}, [0, 100, 250]),
        ("factored@0 dense@1ep", {"steps_per_epoch": 12.5}, [0, 13]),
        ("factored@0ep dense@0.5ep", {"steps_per_epoch": 3}, [0, 2]),
    ],
)
def test_a_boundary_becomes_the_nearest_step(text, run, expected):
    assert starts(text, **run) == expected


@reproducibly
@given(shares(1, 100), st.integers(1, 10**6))
def test_a_share_is_rounded_to_the_nearest_step(share, max_steps):
    exact = Fraction(share) / 100 * max_steps
    assert abs(Boundary.parse(f"{share}%").resolve(Run(max_steps)) - exact) <= Fraction(1, 2) + Fraction(1, 10**6)


# ---- LR anchors


@pytest.mark.parametrize("warmup", [1, 7, 100])
@pytest.mark.parametrize("percent", [10, 25, 50, 75, 90])
def test_an_anchor_on_warmup_and_linear_decay_is_the_first_step_beyond_it(percent, warmup):
    steps = 1000
    run = {"lr": lambda: warmup_then_linear(steps, warmup)}
    # Rising: k / warmup > a.   Falling: (steps - k) / (steps - warmup) < a.   Whole numbers only.
    rises = percent * warmup // 100 + 1
    falls = steps - ((percent * (steps - warmup) - 1) // 100)
    assert starts(f"factored@0 dense@lr>{percent / 100}", steps, **run)[1] == min(rises, warmup)
    assert starts(f"factored@0 dense@lr<{percent / 100}", steps, **run)[1] == falls


def test_a_falling_anchor_does_not_take_the_warmup_for_the_decay():
    curve = warmup_then_linear(100, 20)
    assert curve[0] < 0.5
    assert starts("factored@0 dense@lr<0.5", 100, lr=lambda: curve) == [0, 61]


def test_an_anchor_on_a_stepwise_schedule_is_the_drop():
    assert starts("factored@0 dense@lr<0.5 adapter@lr<0.05", 100, lr=lambda: stepwise(100, 60, 80)) == [0, 60, 80]


def test_an_anchor_is_relative_to_the_peak():
    curve = [3e-4 * lr for lr in warmup_then_linear(100, 20)]
    assert starts("factored@0 dense@lr<0.5", 100, lr=lambda: curve) == [0, 61]


def test_the_curve_is_computed_once_and_only_if_a_boundary_needs_it():
    calls = []

    def curve():
        calls.append(1)
        return stepwise(100, 60, 80)

    plan_of("factored@0 dense@40% adapter@80", 100, lr=curve)
    assert calls == []
    plan_of("factored@0 dense@lr<0.5 adapter@lr<0.05", 100, lr=curve)
    assert calls == [1]


def test_the_curve_of_a_trainers_scheduler_is_that_of_its_formula():
    def make(optimizer):
        return get_linear_schedule_with_warmup(optimizer, num_warmup_steps=7, num_training_steps=50)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    expected = [0.3 * lr for lr in warmup_then_linear(50, 7)]
    assert simulated_curve(make, 0.3, 50)() == pytest.approx(expected)
    assert existing_curve(make(optimizer), 50)() == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == 0  # the warm-up's first value: nothing has been stepped


def test_a_scheduler_that_follows_the_loss_has_no_curve():
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    assert simulated_curve(plateau, 0.3, 50)() is None
    assert existing_curve(plateau(torch.optim.SGD([torch.zeros(1)], lr=0.3)), 50)() is None


# ---- the paper's I and D

# Epochs, LR drops, and I and D by the rule I = 0.54 d1, D = d1 + 2/3 (d2 - d1); the paper's own I, rounded to 5 epochs.
PAPER = {"CIFAR-10": (150, (100, 130), 54, 120, 55), "CIFAR-100": (200, (150, 180), 81, 170, 80)}
paper = pytest.mark.parametrize(("epochs", "drops", "I", "D", "published"), PAPER.values(), ids=PAPER.keys())


@paper
@pytest.mark.parametrize("per_epoch", [1, 10, 391])
def test_the_papers_rule_gives_the_papers_epochs(epochs, drops, I, D, published, per_epoch):  # noqa: E741
    steps = epochs * per_epoch
    curve = stepwise(steps, *(drop * per_epoch for drop in drops))
    first, second = (Fraction(drop * per_epoch) for drop in drops)
    assert Fraction(54, 100) * first == I * per_epoch
    assert first + Fraction(2, 3) * (second - first) == D * per_epoch
    assert starts("paper", steps, lr=lambda: curve) == [0, I * per_epoch, D * per_epoch]
    assert abs(I - published) <= 1


@paper
def test_a_warmup_in_front_does_not_move_i_and_d(epochs, drops, I, D, published):  # noqa: E741
    assert starts("paper", epochs, lr=lambda: stepwise(epochs, *drops, warmup=5)) == [0, I, D]


def test_with_more_drops_the_first_and_the_last_count():
    assert starts("paper", 200, lr=lambda: stepwise(200, 100, 120, 160)) == [0, 54, 140]


NO_TWO_DROPS = {
    "linear": warmup_then_linear(1000, 50),
    "linear without warmup": [(1000 - k) / 1000 for k in range(1000)],
    "cosine": cosine(1000),
    "constant": [1.0] * 1000,
    "one drop": stepwise(1000, 500),
    "small drops": stepwise(1000, 300, 600, by=0.9),
    "zero": [0.0] * 1000,
    "unknown": None,
}


@pytest.mark.parametrize("curve", NO_TWO_DROPS.values(), ids=NO_TWO_DROPS.keys())
def test_without_two_drops_the_dense_phase_is_from_40_to_80_percent(curve):
    assert starts("paper", 1000, lr=lambda: curve) == [0, 400, 800]
    assert starts("paper(final=factored)", 10, lr=lambda: curve and curve[::100]) == [0, 4, 8]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (stepwise(20, 5, 12), [5, 12]),
        (stepwise(20, 5, 12, by=0.5), [5, 12]),
        (stepwise(20, 5, 12, by=0.51), []),
        (stepwise(20, 5, 12, warmup=2), [5, 12]),
        (warmup_then_linear(20, 5), []),
        (cosine(20), []),
        ([1.0] * 20, []),
        ([1.0, 0.1], []),
        ([], []),
        ([1.0] * 10 + [0.0] * 10, [10]),
    ],
)
def test_a_drop_is_a_fall_to_half_or_less_after_a_flat_stretch(curve, expected):
    assert lr_drops(curve) == expected


# ---- presets


@pytest.mark.parametrize("windows", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [10, 40, 75])
def test_cyclic_windows_together_last_their_share_and_are_evenly_spaced(windows, share):
    steps = 100_000
    plan = plan_of(f"cyclic(windows={windows}, share={share})", steps)
    dense = [(p.start, plan.end_of(i)) for i, p in enumerate(plan.phases) if p.kind == "dense"]
    assert len(dense) == windows
    assert [phase.kind for phase in plan.phases] == ["factored", *["dense", "factored"] * windows]
    assert sum(end - start for start, end in dense) == pytest.approx(share / 100 * steps, abs=2 * windows)
    middles = [(start + end) / 2 for start, end in dense]
    assert middles == pytest.approx([steps * (i + 0.5) / windows for i in range(windows)], abs=2)


def test_warmup_is_dense_up_to_its_share():
    assert str(plan_of("warmup(until=25)", 200)) == "dense@0 factored@50"


def test_fixed_is_one_phase():
    assert str(plan_of("fixed", 200, lowrank="adapter")) == "adapter@0"


def ranks_of(text: str) -> list[float]:
    return [phase.rank for phase in plan_of(text).phases]


@pytest.mark.parametrize("shape", ["linear", "exponential", "sigmoid"])
@pytest.mark.parametrize("stages", [2, 3, 5, 10])
def test_decay_goes_down_from_first_to_last_in_equal_stages(shape, stages):
    text = f"decay(first=0.8, last=0.05, stages={stages}, shape={shape})"
    ranks = ranks_of(text)
    assert (ranks[0], ranks[-1]) == pytest.approx((0.8, 0.05))
    assert all(before > after for before, after in pairwise(ranks))
    assert all(phase.kind == "factored" for phase in plan_of(text).phases)
    assert starts(text) == pytest.approx([1000 * j / stages for j in range(stages)], abs=1)


def test_linear_decay_goes_down_by_equal_differences():
    assert ranks_of("decay(first=0.5, last=0.1, stages=5)") == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_exponential_decay_goes_down_by_equal_ratios():
    ranks = ranks_of("decay(first=0.8, last=0.05, stages=5, shape=exponential)")
    assert ranks == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05])


def test_sigmoid_decay_is_symmetric_and_falls_most_in_the_middle():
    ranks = ranks_of("decay(first=0.9, last=0.1, stages=7, shape=sigmoid)")
    assert [high + low for high, low in zip(ranks, reversed(ranks), strict=True)] == pytest.approx([1.0] * 7, abs=1e-5)
    falls = [before - after for before, after in pairwise(ranks)]
    assert falls[0] < falls[1] < falls[2]
    assert falls[0] < 0.2 * falls[2]


@pytest.mark.parametrize("shape", ["linear", "exponential", "sigmoid"])
def test_a_decay_of_two_stages_has_no_shape(shape):
    assert ranks_of(f"decay(first=0.5, last=0.25, stages=2, shape={shape})") == [0.5, 0.25]
