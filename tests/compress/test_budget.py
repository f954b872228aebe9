"""Sharing out a budget, against every assignment there is."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_drt.compress.allocation import allocate


def total(curves, chosen, side):
    return sum(curve[index][side] for curve, index in zip(curves, chosen, strict=True))


def best(curves, budget):
    """The smallest error of all assignments within the budget."""
    everything = product(*(range(len(curve)) for curve in curves))
    return min(total(curves, c, 1) for c in everything if total(curves, c, 0) <= budget)


@st.composite
def curve(draw, convex=False, step=None):
    """Costs rise, errors fall to 0; the saved errors fall too if convex."""
    saved = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    saved = sorted(saved, reverse=True) if convex else saved
    costs = [step] * len(saved) if step else draw(st.lists(st.integers(1, 9), min_size=len(saved), max_size=len(saved)))
    points, cost, error = [], 1, sum(saved)
    for index in range(len(saved) + 1):
        points.append((cost, float(error)))
        if index < len(saved):
            cost, error = cost + costs[index], error - saved[index]
    return points


def budgets(curves):
    return range(total(curves, [0] * len(curves), 0), total(curves, [-1] * len(curves), 0) + 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(curve(convex=True, step=3), min_size=1, max_size=4))
def test_convex_curves_with_steps_of_one_cost_are_shared_out_optimally(curves):
    for budget in budgets(curves):
        chosen = allocate(curves, budget)
        assert total(curves, chosen, 0) <= budget
        assert total(curves, chosen, 1) == best(curves, budget)


@settings(max_examples=100, deadline=None)
@given(st.lists(curve(), min_size=1, max_size=4))
def test_any_curves_are_within_the_budget_and_within_one_moves_saving_of_the_optimum(curves):
    largest_move = max(points[0][1] for points in curves)  # no move saves more than all of a curve
    last = float("inf")
    for budget in budgets(curves):
        chosen = allocate(curves, budget)
        error = total(curves, chosen, 1)
        assert total(curves, chosen, 0) <= budget
        assert error < best(curves, budget) + largest_move
        assert error <= last, "more budget, more error"
        last = error
    assert last == 0


def test_a_move_that_only_pays_at_its_end_is_made_as_a_whole_or_gives_way():
    late = [(1, 10.0), (2, 9.9), (3, 0.0)]  # saves 0.1, then 9.9
    early = [(1, 3.0), (2, 1.0), (3, 0.0)]  # saves 2, then 1
    assert allocate([late, early], 4) == [2, 0]
    assert allocate([late, early], 3) == [0, 1]
    assert allocate([late], 2) == [1]


def test_what_the_best_move_leaves_is_spent_on_smaller_ones():
    large, small = [(1, 9.0), (9, 0.0)], [(1, 2.0), (3, 0.0)]
    assert allocate([large, small, small], 13) == [1, 1, 0]
    assert allocate([large, small, small], 9) == [0, 1, 1]


def test_nothing_is_spent_where_nothing_is_gained():
    assert allocate([[(1, 0.0), (2, 0.0), (9, 0.0)], [(1, 5.0), (3, 5.0), (4, 0.0)]], 20) == [0, 2]
    assert allocate([[(1, 0.0), (2, 0.0)], [(1, 5.0), (3, 4.0), (9, 4.0)]], 20) == [0, 1]


def test_a_budget_below_the_cheapest_options_is_refused():
    with pytest.raises(ValueError, match="the cheapest options cost 5, more than the budget of 4"):
        allocate([[(2, 1.0), (3, 0.0)], [(3, 1.0)]], 4)
