"""One budget shared out among many layers: which of its options each layer gets. Standard library only."""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

Curve = Sequence[tuple[int, float]]
"""Options of one layer as ``(cost, error)``, costs rising and errors falling."""


class _Move(NamedTuple):
    """A layer's change to a costlier option; the smallest tuple saves most."""

    negative_slope: float  # error saved per unit of cost, negated
    layer: int
    option: int
    cost: int


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """Choose one option per layer, so that the costs sum to at most the budget and the errors to little.

    Every layer begins with its cheapest option. Then, again and again, one layer moves to the costlier option (the next
    or a later one) that saves the most error per unit of cost of all that the rest of the budget can pay.

    The sum of errors never rises with the budget. It exceeds the optimum by less than what the first move saves that
    would be best but cannot be paid (Dantzig 1957), and is the optimum where errors fall ever slower and steps cost the
    same.

    Returns:
        Index of the chosen option, by layer.

    Raises:
        ValueError: The cheapest options together exceed the budget.
    """
    chosen = [0] * len(curves)
    left = budget - sum(curve[0][0] for curve in curves)
    if left < 0:
        raise ValueError(f"the cheapest options cost {budget - left}, more than the budget of {budget}.")
    moves = [move for layer in range(len(curves)) if (move := _best(curves, layer, 0, left))]
    heapify(moves)
    while moves:
        move = moves[0]
        if move.cost <= left:
            chosen[move.layer], left = move.option, left - move.cost
        # Each layer's entry is the best move of an earlier time: as `left` shrinks it can only get worse.
        if move := _best(curves, move.layer, chosen[move.layer], left):
            heapreplace(moves, move)
        else:
            heappop(moves)
    return chosen


def _best(curves: Sequence[Curve], layer: int, now: int, left: int) -> _Move | None:
    """The layer's best move that ``left`` can pay; None if there is none that saves anything."""
    curve = curves[layer]
    cost, error = curve[now]
    moves = (
        _Move((curve[option][1] - error) / (curve[option][0] - cost), layer, option, curve[option][0] - cost)
        for option in range(now + 1, len(curve))
        if curve[option][0] - cost <= left and curve[option][1] < error
    )
    return min(moves, default=None)
