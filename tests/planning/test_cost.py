"""The cost model against arithmetic that anyone can redo."""

import pytest

from hf_drt.forms import Adapter, Dense, Factored
from hf_drt.planning.cost import plan_cost
from hf_drt.schedule import Run, Schedule

LLAMA = [(1024, 1024)] * 4 + [(2752, 1024)] * 2 + [(1024, 2752)]  # d = 1024, 4 d x d and 3 of d x 8/3 d


def cost(schedule, ratio):
    plan = Schedule.parse(schedule).resolve(Run(1000))
    rank = int(1024 * ratio)
    forms = {"factored": Factored(rank), "adapter": Adapter(rank), "dense": Dense()}
    return plan_cost(plan, LLAMA, [[forms[p.kind]] * len(LLAMA) for p in plan.phases])


@pytest.mark.parametrize(
    ("window", "ratio", "parameters", "adapter_flops", "factored_flops"),
    [((37, 80), 1 / 4, 0.66, 0.79, 0.66), ((37, 80), 1 / 8, 0.55, 0.68, 0.55), ((40, 60), 1 / 8, 0.36, 0.63, 0.36)],
)
def test_average_costs_of_llama_shapes(window, ratio, parameters, adapter_flops, factored_flops):
    start, end = window
    with_adapter = cost(f"factored@0 dense@{start}% adapter@{end}%", ratio)
    refactored = cost(f"factored@0 dense@{start}% factored@{end}%", ratio)
    assert with_adapter.parameters == pytest.approx(parameters, abs=0.01)
    assert with_adapter.flops == pytest.approx(adapter_flops, abs=0.01)
    assert refactored.flops == pytest.approx(factored_flops, abs=0.01)


def test_a_factored_layer_at_break_even_costs_as_much_as_dense():
    plan = Schedule.parse("factored@0").resolve(Run(1))
    assert plan_cost(plan, [(64, 64)], [[Factored(32)]]).flops == 1
    assert plan_cost(plan, [(64, 64)], [[Adapter(32)]]).flops == pytest.approx(2 / 3 + 1)


def test_the_average_is_weighted_by_steps():
    plan = Schedule.parse("dense@0 factored@25%").resolve(Run(100))
    result = plan_cost(plan, [(64, 64)], [[Dense()], [Factored(8)]])
    assert [phase.steps for phase in result.phases] == [25, 75]
    assert result.flops == pytest.approx(0.25 + 0.75 * 0.25)
