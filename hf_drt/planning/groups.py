"""Groups of target layers, which have full rank in turns: by block, by kind of layer, or by patterns."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from hf_drt.config import DRTConfig
from hf_drt.forms import LayerShape
from hf_drt.planning.layers import Shapes

UNEVEN = 1.25
"""How much larger than the mean the largest group of whole blocks may be."""
Weights = dict[str, int]  # how many a unit has, by its key


def group_numbers(targets: Shapes, count: int, config: DRTConfig) -> dict[str, int]:
    """The group of every target layer, from 1 to ``count``, by name; no group is empty.

    By blocks, neighbours stand together, and the largest group has as few weights as such a division can have. Where
    that is more than :data:`UNEVEN` times the mean, as of 12 blocks in 8 groups, or there are fewer blocks than groups,
    what stands in lists inside of them is divided, or the layers themselves. By kind of layer, the names without their
    numbers are what is divided. Patterns are one per group; a layer is in that of the first one that its name matches.

    Raises:
        ValueError: There are fewer kinds or layers than groups, not as many patterns, or one of them finds no layer, or
            a layer is found by none.
    """
    if config.group_by not in (None, ["block"], ["kind"]):
        return _by_patterns(targets, count, config.group_by)
    if config.group_by == ["kind"]:
        return _divided(targets, count, _kind, "kinds of layers")
    for depth in range(1, max(map(_depth, targets)) + 1):
        blocks = {name: _block(name, depth) for name in targets}
        if len(set(blocks.values())) >= count:
            found = _divided(targets, count, blocks.__getitem__, "blocks")
            if _largest(targets, found) * count <= UNEVEN * sum(map(_weights, targets.values())):
                return found
    return _divided(targets, count, lambda name: name, "layers")


def group_counts(targets: Shapes, config: DRTConfig) -> range:
    """Into how many groups the layers can be divided by ``config.group_by``: two or more."""
    if config.group_by == ["kind"]:
        return range(2, len(set(map(_kind, targets))) + 1)
    if config.group_by in (None, ["block"]):
        return range(2, len(targets) + 1)
    return range(max(2, len(config.group_by)), len(config.group_by) + 1)


def _kind(name: str) -> str:
    """The name without its numbers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1", name)


def _largest(targets: Shapes, numbers: dict[str, int]) -> int:
    """Weights of the largest group."""
    held = Counter[int]()
    for name, number in numbers.items():
        held[number] += _weights(targets[name])
    return max(held.values())


def _weights(shape: LayerShape) -> int:
    return math.prod(shape) * (shape.experts or 1)


def _depth(name: str) -> int:
    return sum(part.isdigit() for part in name.split("."))


def _block(name: str, depth: int) -> str:
    """The name up to its number of that depth, or to its last one."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()][:depth]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else name


def _divided(targets: Shapes, count: int, unit_of: Callable[[str], str], what: str) -> dict[str, int]:
    weights: Weights = {}
    for name, shape in targets.items():
        weights[unit_of(name)] = weights.get(unit_of(name), 0) + _weights(shape)
    if len(weights) < count:
        raise ValueError(
            f"the schedule has {count} groups, and the target layers are of {len(weights)} {what}. Take "
            f"{f'at most {len(weights)}' if len(weights) > 1 else 'a schedule without'} groups"
            f"{', or group_by=block' if what == 'kinds of layers' else ''}."
        )
    number = dict(zip(weights, division(list(weights.values()), count), strict=True))
    return {name: number[unit_of(name)] for name in targets}


def division(sizes: Sequence[int], count: int) -> list[int]:
    """The group of each of a row of units, from 1 to ``count``, neighbours together, none empty; the largest group is
    as small as it can be."""
    low, high = max(sizes), sum(sizes)
    while low < high:  # the least capacity by which `count` groups are enough
        middle = (low + high) // 2
        low, high = (low, middle) if _packed(sizes, middle, count)[-1] <= count else (middle + 1, high)
    return _packed(sizes, low, count)


def _packed(sizes: Sequence[int], capacity: int, count: int) -> list[int]:
    """Each group filled up to the capacity, but that a unit is left for each of ``count`` groups."""
    return list(accumulate(_steps(sizes, capacity, count)))


def _steps(sizes: Sequence[int], capacity: int, count: int) -> Iterator[int]:
    held, number = 0, 0
    for place, size in enumerate(sizes):
        full = number == 0 or held + size > capacity
        must = len(sizes) - place <= count - number  # as many groups are empty as units are left
        held, number = (size, number + 1) if full or must else (held + size, number)
        yield int(full or must)


def _by_patterns(targets: Shapes, count: int, patterns: Sequence[str]) -> dict[str, int]:
    if len(patterns) != count:
        raise ValueError(f"group_by has {len(patterns)} patterns, and the schedule {count} groups. Give one per group.")
    found = {name: next((i for i, p in enumerate(patterns, 1) if re.search(p, name)), None) for name in targets}
    if lost := [name for name, number in found.items() if number is None]:
        raise ValueError(
            f"group_by: no pattern matches {lost[0]} ({len(lost)} of {len(found)} layers are without a group), which "
            "would never have its turn. Add a pattern, or exclude the layers."
        )
    if idle := [pattern for number, pattern in enumerate(patterns, 1) if number not in found.values()]:
        raise ValueError(f"group_by: {idle[0]!r} is the first match of no layer. Change it, or the order of patterns.")
    return {name: number for name, number in found.items() if number is not None}


def mean_falls(before: Mapping[str, float], now: Mapping[str, float], numbers: Mapping[str, int]) -> dict[int, float]:
    """By what share a measure of layers has fallen, on average over each group: ``1 - now / before``, and 0 of a layer
    that began at 0.

    Args:
        before, now: Of every layer, by name.
        numbers: The group of every layer.
    """
    falls: dict[int, list[float]] = {}
    for name, number in numbers.items():
        falls.setdefault(number, []).append(1 - now[name] / before[name] if before[name] else 0.0)
    return {number: sum(shares) / len(shares) for number, shares in sorted(falls.items())}
