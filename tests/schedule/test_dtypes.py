"""Dtypes of phases: the grammar, what is refused, and rank and dtype chosen together, against the rule by hand."""

import itertools

import pytest

from hf_drt import Phase, Plan, Schedule
from hf_drt.schedule import Run
from hf_drt.schedule.budget_step import RANKS, THROUGHOUT, budget_rank_and_dtype


def plan_of(text: str, steps: int = 100, lowrank: str = "factored", **run) -> Plan:
    return Schedule.parse(text).resolve(Run(steps, **run), lowrank)


@pytest.mark.parametrize(
    "text",
    [
        "factored:0.125/bf16@0 dense/fp32@80%",
        "dense/bf16@0 dense/fp32@1.5ep dense@90%",
        "lowrank:budget/auto@0 dense/auto@budget",
        "factored/bf16@0 dense[1/8]/fp32@40% dense[2/8]+frozen[1/8]/bf16@50%",
        "adapter:8/fp32@0 frozen/bf16@lr<0.5",
    ],
)
def test_a_schedule_with_dtypes_is_written_as_it_was_read(text):
    assert str(Schedule.parse(text)) == text
    assert Schedule.parse(str(Schedule.parse(text))) == Schedule.parse(text)


def test_a_plan_with_dtypes_is_read_again_from_its_text():
    plan = plan_of("lowrank:0.25/bf16@0 dense[next/3]/fp32@10% lowrank@20%", lowrank="adapter")
    assert str(plan) == "adapter:0.25/bf16@0 dense[next/3]/fp32@10 adapter@20"
    assert plan_of(str(plan)) == plan
    assert [phase.dtype for phase in plan.phases] == ["bf16", "fp32", None]
    assert [phase.name for phase in plan.phases] == ["adapter/bf16", "dense[next/3]/fp32", "adapter"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factored/fp16@0", r"'fp16' in 'factored/fp16@0' is not a dtype of a phase: .* need a loss scaler, .*Write b"),
        ("factored/half@0", r"'half' in .* is not a dtype of a phase: gradients in fp16 need a loss scaler"),
        ("factored/fp8@0", r"'fp8' in 'factored/fp8@0' is not a dtype of a phase: fp8 needs a GPU"),
        ("frozen/int8@0", r"'int8' in .* autocast computes in none; .* with frozen_dtype=int8\. Write bf16 or fp3"),
        ("dense/bfloat16@0", r"'bfloat16' in 'dense/bfloat16@0' is written bf16"),
        ("dense/FP32@0", r"'FP32' in 'dense/FP32@0' is written fp32"),
        ("dense/tf32@0", r"'tf32' in 'dense/tf32@0' is not a dtype; allowed are fp32, bf16, and auto where the budget"),
        ("dense/@0", r"'' in 'dense/@0' is not a dtype"),
        ("dense/bf16/fp32@0", r"'dense/bf16/fp32@0' has a '/' before its end\. A phase has one dtype"),
        ("dense@0 dense/bf16[1/2]@9", r"'dense/bf16\[1/2\]@9' has a '/' before its end.*dense\[2/8\]\+frozen\[1/8\]/b"),
        ("dense@0 dense[1/2]/bf16+frozen[2/2]@9", r"has a '/' before its end\. A phase has one dtype, for all its lay"),
        ("dense/bf16@0 dense/bf16@9", r"'dense/bf16@0 dense/bf16@9' is one dense phase; drop the second"),
        ("drift/bf16", r"'drift/bf16' has a dtype and no boundary\. .*e\.g\. factored/bf16@0; of a preset write"),
        ("factored:0.25/auto@0", r"dtype 'auto' is chosen together with a rank, .*e\.g\. lowrank:budget/auto@0, or wr"),
        ("lowrank:budget/auto@0 dense@50%", r"'dense@50%' has no dtype, and the budget of .* Write one, e\.g\. dense/"),
        ("lowrank:budget/auto@0 dense/auto@lr<0.5", r"'dense/auto@lr<0\.5' begins at a learning rate, and a resumed r"),
        ("auto(precision=half)", r"preset option precision must be run, fp32, bf16 or auto, got half"),
    ],
)  # fmt: skip
def test_a_dtype_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


def test_a_phase_made_by_hand_has_a_dtype_or_none():
    with pytest.raises(ValueError, match=r"dtype of a phase must be one of fp32, bf16, or None, got 'auto'"):
        Phase(0, "dense", dtype="auto")


def test_phases_that_differ_in_their_dtypes_alone_begin_no_form():
    plan = plan_of(
        "factored/bf16@0 factored/fp32@10 factored@20 factored@30 dense/fp32@40 dense/bf16@50 factored/fp32@60"
    )
    assert [plan.form_start(index) for index in range(7)] == [0, 0, 0, 30, 40, 40, 60]
    assert [plan.recasts(before, before + 1) for before in range(6)] == [True, True, False, False, True, False]
    assert plan.recasts(0, 2)
    assert not plan.recasts(0, 6)  # what lies between has changed the layers
    assert not plan.recasts(None, 1)
    groups = plan_of("factored@0 dense[next/3]/bf16@10 dense[next/3]/fp32@20 dense[1/3]/bf16@30 dense[1/3]/fp32@40")
    assert [plan.form_start(index) for plan in [groups] for index in range(5)] == [0, 10, 20, 30, 30]


def test_windows_of_a_trigger_have_the_dtype_of_the_phase():
    from hf_drt.schedule import Trigger, Windows

    plan = plan_of("factored/bf16@0")
    windows = Windows(Trigger(signal="rank", drop=1, every=10), plan, 1.0, lambda plan: 0.0)
    for step, rank in ((10, 5.0), (20, 1.0)):
        plan = windows.check(plan, step, rank)
    assert str(plan) == "factored/bf16@0 dense/bf16@20 factored/bf16@30"


# ---- rank and dtype under one budget


def seconds(factor: float, own: float = 1.0):
    """Of a step: dense 1 in fp32 and ``factor`` in bf16, in low rank 2 r and ``own`` 2 r."""

    def cost(kind: str, rank: float | None, dtype: str) -> float:
        low = kind != "dense"
        return (2 * rank if low else 1.0) * (1 if dtype == "fp32" else own if low else factor)

    return cost


@pytest.mark.parametrize("budget", [0.13, 0.2, 0.26, 0.33, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("factor", "own"), [(0.5, 0.5), (0.9, 0.7), (1.3, 1.1), (0.4, 1.2), (float("inf"), float("inf"))]
)
@pytest.mark.parametrize("dense", ["auto", "fp32", None])
def test_the_choice_is_the_largest_rank_that_fits_and_then_the_most_exact_dtype(budget, factor, own, dense):
    """By going through all pairs."""
    cost, full = seconds(factor, own), 0.1 if dense else 0.0
    ranks = RANKS if dense else THROUGHOUT

    def takes(rank: float, dtype: str) -> float:
        in_full_rank = cost("dense", None, dtype if dense == "auto" else dense or "fp32")
        return (1 - full) * cost("factored", rank, dtype) + (full * in_full_rank if full else 0)

    fitting = [
        (r, -i, d) for r, (i, d) in itertools.product(ranks, enumerate(("fp32", "bf16"))) if takes(r, d) <= budget
    ]
    run = Run(100, budget=budget, seconds=cost)
    if not fitting:
        with pytest.raises(
            ValueError, match=r"no rank meets a budget of .* in any dtype: of the seconds of dense train"
        ):
            budget_rank_and_dtype("factored", run, full, dense or "auto")
        return
    rank, _, dtype = max(fitting)
    assert budget_rank_and_dtype("factored", run, full, dense or "auto") == (rank, dtype)


@pytest.mark.parametrize(
    ("text", "budget", "factor", "plan"),
    [
        ("auto(precision=auto)", 0.2, 0.5, "factored:0.1875/bf16@0"),
        ("auto(precision=auto)", 0.2, 1.5, "factored:0.09375/fp32@0"),
        ("auto(precision=auto)", 0.6, 0.5, "factored:0.25/fp32@0"),  # the largest rank fits in both
        # 0.25 in bf16 takes 0.25, dense 0.5: 0.4 * 100 = 0.25 x + 0.5 (100 - x)
        ("auto_late(precision=auto)", 0.4, 0.5, "factored:0.25/bf16@0 dense/bf16@40"),
        ("lowrank:budget/auto@0 dense/fp32@budget", 0.4, 0.5, "factored:0.25/bf16@0 dense/fp32@80"),
        ("auto(precision=bf16)", 0.2, 0.5, "factored:0.09375/bf16@0"),  # by FLOPs: 2 r
        ("auto_late(precision=fp32)", 0.4, 0.5, "factored:0.125/fp32@0 dense/fp32@80"),
        ("auto_late", 0.4, 0.5, "factored:0.125@0 dense@80"),
    ],
)
def test_a_budget_of_seconds_decides_ranks_boundaries_and_dtypes(text, budget, factor, plan):
    flops = {"cost": lambda kind, rank: 1.0 if kind == "dense" else 2 * rank}
    found = plan_of(text, budget=budget, seconds=seconds(factor, factor), **flops)
    if text == "auto_late(precision=fp32)" or text == "auto_late":
        assert found.phases[0].dtype == ("fp32" if "fp32" in text else None)
        assert plan_of("auto_late", budget=budget, **flops).phases[1].start == found.phases[1].start
    else:
        assert str(found) == plan


def test_a_budget_has_to_be_of_seconds_where_it_decides_a_dtype():
    with pytest.raises(ValueError, match=r"a dtype 'auto' needs seconds=, .*let hf_drt measure them"):
        plan_of("auto(precision=auto)", budget=0.2, cost=lambda kind, rank: 0.1)
    schedule = Schedule.parse("auto(precision=auto)")
    least = schedule.least_budget(Run(100, budget=0.2, seconds=seconds(0.5, 0.5)))
    assert least == pytest.approx(2 / 32 * 0.5)
    assert schedule.budget_chooses_dtype
    assert not Schedule.parse("auto(precision=bf16)").budget_chooses_dtype


def test_a_plan_that_takes_more_than_the_budget_of_seconds_is_refused():
    with pytest.raises(
        ValueError, match=r"rank 'budget' leaves 10% of the run for full rank, .*more than the budget of 0"
    ):
        plan_of("lowrank:budget/auto@0 dense/auto@50%", budget=0.3, seconds=seconds(0.5, 0.5))
