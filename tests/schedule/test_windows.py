"""Full-rank windows that begin during a run: when, for how long, and within which budget."""

import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hf_drt import DRTConfig, DynamicRank
from hf_drt.schedule import PRESETS, Check, Phase, Plan, Run, Schedule, Trigger
from hf_drt.schedule.presets import AUTO_BUDGET
from hf_drt.schedule.windows import Windows

START = Plan((Phase(0, "factored"),), 100)


def windows(limit: float = 1.0, cost=lambda plan: 0.0, **options) -> Windows:
    return Windows(Trigger(**{"window": 10.0, "every": 5.0} | options), START, limit, cost)


def dense_share(plan: Plan) -> float:
    steps = (plan.end_of(i) - p.start for i, p in enumerate(plan.phases) if p.kind == "dense")
    return sum(steps) / plan.max_steps


# ---- when a window is due


@pytest.mark.parametrize(
    ("options", "checks", "expected"),
    [
        ({"signal": "rank", "drop": 10}, [Check(5, 50.0), Check(10, 46.0)], None),
        ({"signal": "rank", "drop": 10}, [Check(5, 50.0), Check(10, 44.0)], "rank"),
        ({"signal": "rank", "drop": 10}, [Check(5, 40.0), Check(10, 50.0), Check(15, 44.9)], "rank"),  # of the highest
        ({"signal": "rank"}, [Check(5, 50.0, 2.0), Check(10, 50.0, 2.0)], None),
        ({"signal": "loss", "plateau": 1}, [Check(5, 50.0, 2.0), Check(10, 40.0, 1.97)], None),
        ({"signal": "loss", "plateau": 1}, [Check(5, 50.0, 2.0), Check(10, 50.0, 1.99)], "loss"),
        ({"signal": "loss"}, [Check(5, 50.0, 2.0)], None),
        ({"signal": "loss"}, [Check(5, 50.0), Check(10, 40.0)], None),  # the loss is not told
        ({"signal": "either", "drop": 10, "plateau": 1}, [Check(5, 50.0, 2.0), Check(10, 50.0, 2.1)], "loss"),
        ({"signal": "either", "drop": 10, "plateau": 1}, [Check(5, 50.0, 2.0), Check(10, 40.0, 1.0)], "rank"),
    ],
)
def test_a_window_is_due_when_the_rank_falls_or_the_loss_stands_still(options, checks, expected):
    assert Trigger(**options).reason(checks) == expected


def test_checks_are_made_at_equal_distances_and_in_low_rank_phases():
    plan = Plan((Phase(0, "factored"), Phase(30, "dense"), Phase(50, "factored")), 100)
    due = [step for step in range(101) if windows().is_due(plan, step)]
    assert due == [5, 10, 15, 20, 25, 30, 55, 60, 65, 70, 75, 80, 85, 90, 95]


# ---- how a plan grows


def test_a_window_has_its_length_and_a_phase_like_the_first_after_it():
    w = windows(drop=10)
    plan = w.check(START, 5, 50.0)
    assert plan == START
    plan = w.check(plan, 10, 30.0)
    assert str(plan) == "factored@0 dense@10 factored@20"
    assert [row["decision"] for row in w.trace] == [None, "rank"]


def test_the_highest_rank_is_that_of_the_present_phase():
    w = windows(signal="rank", drop=10)
    plan = w.check(w.check(START, 5, 50.0), 10, 30.0)
    assert w.check(plan, 25, 30.0) == plan  # a first check after the window, whatever was before it


def test_a_window_at_the_end_lasts_to_the_end():
    w = windows(drop=10)
    plan = w.check(w.check(START, 90, 50.0), 95, 30.0)
    assert str(plan) == "factored@0 dense@95"


def test_the_mean_loss_is_of_the_steps_since_the_last_check():
    w = windows(signal="loss", plateau=1)
    for loss in (4.0, 2.0):
        w.add_loss(loss)
    w.check(START, 5, 50.0)
    w.add_loss(2.99)
    assert str(w.check(START, 10, 50.0)) == "factored@0 dense@10 factored@20"
    assert [row["loss"] for row in w.trace] == [3.0, 2.99]


def test_a_window_that_would_exceed_the_budget_does_not_begin():
    w = windows(limit=0.15, cost=dense_share, drop=10)
    plan = w.check(w.check(START, 5, 50.0), 10, 30.0)
    assert dense_share(plan) == 0.1
    plan = w.check(w.check(plan, 25, 50.0), 30, 30.0)
    assert dense_share(plan) == 0.1
    assert [row["decision"] for row in w.trace] == [None, "rank", None, "budget"]


def test_the_trace_goes_on_where_it_was():
    w, other = windows(drop=10), windows(drop=10)
    w.add_loss(1.5)
    w.check(START, 5, 50.0)
    w.add_loss(2.5)
    other.load_state_dict(w.state_dict())
    assert other.check(START, 10, 30.0) == w.check(START, 10, 30.0)
    assert other.trace == w.trace


@pytest.mark.parametrize(
    "state", [{}, {"trace": [{}], "loss_sum": 0, "loss_steps": 0}, {"trace": 5, "loss_sum": 0, "loss_steps": 0}]
)
def test_a_damaged_trace_is_refused(state):
    with pytest.raises(ValueError, match="the state's trace of checks is damaged"):
        windows().load_state_dict(state)


# ---- as text


def test_the_preset_round_trips():
    schedule = Schedule.parse("adaptive(signal=rank, drop=2.5, window=20)")
    assert schedule.trigger == Trigger("rank", 2.5, 1.0, 20.0, 5.0)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptive(signal=both)", r"signal must be rank, loss or either, got both"),
        ("adaptive(drop=0)", r"option drop must be in \(0, 100\), in %, got 0"),
        ("adaptive(window=100)", r"option window must be in \(0, 100\), in %, got 100"),
        ("adaptive(every=-1)", r"option every must be in \(0, 100\), in %, got -1"),
        ("adaptive(plateau=x)", r"option 'plateau' of preset 'adaptive' must be like 1\.0, got 'x'"),
        ("adaptive(size=3)", r"has no option 'size'; its options are: signal, drop, plateau, window, every"),
    ],
)
def test_options_are_checked(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


# ---- the budget in force


@pytest.mark.parametrize(
    ("schedule", "settings", "share"),
    [
        ("auto_late", {"dense_query_key": False}, 0.3),
        ("lowrank:budget@0 dense@budget", {"dense_query_key": False}, 0.3),
        ("factored@0 dense@budget", {"rank_ratio": 0.0625}, 0.4),
        ("adapter@0 dense@budget", {"rank_ratio": 0.0625}, 0.9),
        ("factored@0 lowrank@10% dense@budget", {"rank_ratio": 0.0625, "start": "pretrained"}, 0.9),
        ("auto", {"start": "pretrained"}, 0.9),
        ("auto_late", {"start": "pretrained"}, 0.9),
        ("auto_late", {"budget": 0.5}, 0.5),
    ],
)
def test_a_budget_that_is_not_given_follows_the_form(schedule, settings, share):
    config = DRTConfig(schedule=schedule, rank_multiple=1, **settings)
    assert DynamicRank(tiny.llama(), config, max_steps=1000).cost().flops == pytest.approx(share, abs=2e-3)


def test_the_budget_of_auto_is_its_own_where_low_rank_means_factors():
    wide = LlamaConfig(vocab_size=8, hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    resolved = DynamicRank(LlamaForCausalLM(wide), "auto", max_steps=100).resolved
    assert resolved.budget == AUTO_BUDGET == PRESETS["auto"].budget
    # The largest rank, a multiple of 8, that keeps within: r (4 * 512 + 3 * 1280) of 4 * 256^2 and 3 * 256 * 1024
    # multiply-adds.
    costs = {r / 256: r * (4 * 512 + 3 * 1280) / (4 * 256**2 + 3 * 256 * 1024) for r in range(8, 65, 8)}
    assert resolved.plan.phases[0].rank == max(share for share, cost in costs.items() if cost <= AUTO_BUDGET)
    assert resolved.cost.flops == pytest.approx(costs[resolved.plan.phases[0].rank])
    assert f"{AUTO_BUDGET:g} in 'auto'" in DRTConfig.__dataclass_fields__["budget"].metadata["help"]


def test_in_a_narrow_model_auto_takes_the_least_that_a_rank_allows():
    # Rank 8, the least, as in test_a_low_rank_phase_that_leaves_no_budget_for_windows_is_refused.
    assert DynamicRank(tiny.llama(), "auto", max_steps=1000).cost().flops == pytest.approx(0.425)
    with pytest.raises(ValueError, match=r"no rank meets a budget of 0.3: .* takes at least 0.425\. Raise"):
        DynamicRank(tiny.llama(), DRTConfig(schedule="auto", budget=0.3), max_steps=1000)


def test_in_a_narrow_model_auto_late_takes_the_least_that_a_rank_allows():
    # Rank 8, the least, of the layers of test_a_low_rank_phase_that_leaves_no_budget_for_windows_is_refused, with query
    # and key dense: (2048 + 2 * 8 * 64 + 3 * 8 * 96) / (4 * 1024 + 3 * 2048) = 0.525, and a tenth in full rank.
    cost = DynamicRank(tiny.llama(), DRTConfig(schedule="auto_late"), max_steps=1000).cost().flops
    assert cost == pytest.approx(0.9 * 0.525 + 0.1, abs=1e-3)
    with pytest.raises(ValueError, match=r"no rank meets a budget of 0.3: .* takes at least 0.573"):
        DynamicRank(tiny.llama(), DRTConfig(schedule="auto_late", budget=0.3), max_steps=1000)


def test_a_rank_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"rank is 4, and would have no effect: every low-rank phase has a rank of"):
        DynamicRank(tiny.llama(), DRTConfig(schedule="auto", rank=4), max_steps=100)


# ---- in a hand-written loop


@pytest.mark.parametrize(("text", "settings"), [("factored@0 dense@40%", {"rank": 4}), ("dense@0", {})])
def test_a_trigger_needs_one_low_rank_phase(text, settings):
    plan = Schedule.parse(text).resolve(Run(20))
    with pytest.raises(ValueError, match=r"to a plan of one low-rank phase, got the plan '.*dense@\d"):
        DynamicRank(tiny.llama(), DRTConfig(**settings), plan=plan, trigger=Trigger())


@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_a_low_rank_phase_that_leaves_no_budget_for_windows_is_refused(start):
    # Rank 8 of 4 layers of 32 x 32 and 3 of 32 x 64, twice: (4 * 8 * 64 + 3 * 8 * 96) / (4 * 1024 + 3 * 2048) = 0.425,
    # and 2/3 more as adapters.
    text, budget = ("0.425", 0.42) if start == "scratch" else ("1.092", None)
    config = DRTConfig(schedule="adaptive", rank=8, start=start, budget=budget)
    with pytest.raises(ValueError, match=rf"alone takes {text} of the dense training FLOPs.* Lower the rank"):
        DynamicRank(tiny.llama(), config, max_steps=50)


def test_losses_of_a_window_are_not_held_against_those_after_it():
    config = DRTConfig(schedule="adaptive(signal=loss,plateau=1,window=20,every=10)", rank=4, budget=0.9)
    drt = DynamicRank(tiny.llama(), config, max_steps=50)
    for step in range(1, 31):
        drt.observe(step, loss=1.0 if 10 < step <= 20 else 5.0 - step / 10 * (step > 20))
    assert str(drt.plan) == "factored@0 dense@10 factored@20"
    assert [check["loss"] for check in drt.windows.trace] == [5.0, 5.0, pytest.approx(2.7), pytest.approx(2.2)]


def test_a_loop_gets_its_windows():
    config = DRTConfig(schedule="adaptive(signal=loss,plateau=1,window=20,every=10)", rank=4, budget=0.5)
    drt = DynamicRank(tiny.llama(), config, max_steps=50)
    assert str(drt.plan) == "factored@0"
    grown = [step for step in range(1, 51) if drt.observe(step, loss=1.0)]
    assert grown == [10, 45]  # a whole window at 30 would be too much; what is left of the run at 45 is not
    assert str(drt.plan) == "factored@0 dense@10 factored@20 dense@45"
    assert drt.cost().flops <= 0.5
    assert [check["step"] for check in drt.windows.trace if check["decision"] == "budget"] == [30, 35, 40]
