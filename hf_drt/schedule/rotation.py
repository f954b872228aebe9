"""Full rank in turns: the text of a schedule in which one group of layers after the other is dense."""

import random

from hf_drt.schedule.boundary import number_text
from hf_drt.schedule.parts import LAST, NEXT, Group, Part, parts_text

ORDERS = ("ascending", "descending", "random", "need")
AFTER = ("frozen", "adapter", "lowrank", "factored")


def rotation(groups: int, share: float, order: str, after: str, rounds: int, seed: int) -> str:
    """``lowrank@0``, and for the last ``share`` % of the run ``groups * rounds`` turns of equal length; in each, one
    group is dense, and that of the turn before gets the form ``after``.

    Args:
        groups: Into which the layers are divided, 2 or more.
        share: Of the run, in (0, 100).
        order: Of the groups in a round: one of :data:`ORDERS`.
        after: One of :data:`AFTER`.
        rounds: How often each group has its turn.
        seed: Of the order 'random', which is another one in each round.
    """
    turns = [group for index in range(rounds) for group in _round(groups, order, seed + index)]
    text = ["lowrank@0"]
    for index, group in enumerate(turns):
        parts = [Part("dense", None, group)]
        if index and (before := _before(turns, index)) != group:
            parts.append(Part(after, None, before))
        start = 100 - share + share * index / len(turns)
        text.append(f"{parts_text(parts)}@{number_text(round(start, 10))}%")
    return " ".join(text)


def _round(groups: int, order: str, seed: int) -> list[Group]:
    numbers: list = [NEXT] * groups if order == "need" else list(range(1, groups + 1))
    if order == "descending":
        numbers.reverse()
    if order == "random":
        random.Random(seed).shuffle(numbers)
    return [Group(number, groups) for number in numbers]


def _before(turns: list[Group], index: int) -> Group:
    group = turns[index - 1]
    return group if group.decided else Group(LAST, group.of)
