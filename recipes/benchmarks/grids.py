"""Methods made from a grid: one full-rank window, from I to D per cent of the run, for each pair of I and D."""

from collections.abc import Iterator
from typing import Any

FORMS = ("factored", "adapter", "lowrank")


def grid_methods(name: str, grids: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods ``<grid>_<I>_<D>`` of a task's section ``grid``.

    A grid is ``{"before": form, "after": form, "I": [...], "D": [...], "training": {...}}``; the schedule of a pair is
    ``before@0 dense@I% after@D%``, without its first phase for I = 0 and without its last one for D = 100. Pairs with
    I >= D are left out.

    Args:
        name: Of the task, for messages.
        grids: The section.

    Raises:
        ValueError: An entry is missing, unknown, or outside its interval.
    """
    methods = {}
    for grid, section in grids.items():
        _check(f"grid {grid!r} of {name}", section)
        for low, high in pairs(section):
            training = section.get("training", {}) | {"drt_schedule": _schedule(section, low, high)}
            methods[method_name(grid, low, high)] = {"training": training}
    return methods


def pairs(section: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(I, D) of the grid's methods."""
    return ((low, high) for low in section["I"] for high in section["D"] if low < high)


def method_name(grid: str, low: int, high: int) -> str:
    """Name of the method with the window from ``low`` to ``high`` %."""
    return f"{grid}_{low}_{high}"


def _schedule(section: dict[str, Any], low: int, high: int) -> str:
    before = f"{section['before']}@0 dense@{low}%" if low else "dense@0"
    return before if high == 100 else f"{before} {section['after']}@{high}%"


def _check(what: str, section: dict[str, Any]) -> None:
    if missing := {"before", "after", "I", "D"} - set(section):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}.")
    if unknown := set(section) - {"before", "after", "I", "D", "training"}:
        raise ValueError(f"{what} has unknown entries: {', '.join(sorted(unknown))}.")
    for key in ("before", "after"):
        if section[key] not in FORMS:
            raise ValueError(f"{what}: {key} must be one of {', '.join(FORMS)}, got {section[key]!r}.")
    for key, allowed in (("I", range(100)), ("D", range(1, 101))):
        values = section[key]
        if not values or len(set(values)) < len(values) or not all(v in allowed for v in values):
            raise ValueError(
                f"{what}: {key} must be different whole numbers from {allowed[0]} to {allowed[-1]}, in % of the run, "
                f"got {values}."
            )
    if not any(pairs(section)):
        raise ValueError(f"{what} is empty: no I of {section['I']} is below a D of {section['D']}.")
