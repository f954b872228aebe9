"""Methods whose two learning rates are tuned: that of the target layers' matrices, and that of all other weights.

A task's section ``tuned`` gives each of them a grid. Every pair of rates is a run of a share of the length, with one seed;
the method itself takes the pair whose run ended with the lowest loss of the evaluation.
"""

from collections.abc import Callable, Iterator
from typing import Any

SEED = 1  # of all runs of a grid
_SECTIONS = {"training", "rate", "matrices", "others"}


def tuned_methods(name: str, section: dict[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """The methods of a task's section ``tuned``: of each method ``<method>_m<rate>_o<rate>`` for the grid, and itself.

    The section is ``{"share": s, "methods": {...}}``; a method of it ``{"training": {...}, "rate": argument, "matrices":
    [...], "others": [...]}``. ``rate`` names the training argument that is the matrices' rate.

    Args:
        name: Of the task, for messages.
        steps: Update steps of the full length, of which a run of the grid makes the share s, in (0, 1].

    Raises:
        ValueError: An entry is missing, unknown, or outside its interval.
    """
    share, methods = section.get("share"), section.get("methods", {})
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"tuned of {name}: share must be in (0, 1], got {share!r}.")
    made: dict[str, dict[str, Any]] = {}
    for method, entry in methods.items():
        _check(f"tuned method {method!r} of {name}", entry)
        short = {"max_steps": round(share * steps)}
        for matrices, others in _pairs(entry):
            training = entry["training"] | _rates(entry, matrices, others) | short
            made[point_name(method, matrices, others)] = {"training": training, "point_of": method}
        made[method] = {"training": entry["training"], "best_of": entry}
    return made


def point_name(method: str, matrices: float, others: float) -> str:
    """Name of the run of a grid."""
    return f"{method}_m{matrices:g}_o{others:g}"


def best_rates(method: str, entry: dict[str, Any], loss_of: Callable[[str], float]) -> dict[str, float]:
    """The training arguments of the pair of rates with the lowest loss.

    Args:
        loss_of: Gives the loss at the end of a run of the grid, by its name.
    """
    matrices, others = min(_pairs(entry), key=lambda pair: loss_of(point_name(method, *pair)))
    return _rates(entry, matrices, others)


def _pairs(entry: dict[str, Any]) -> Iterator[tuple[float, float]]:
    return ((m, o) for m in entry["matrices"] for o in entry["others"])


def _rates(entry: dict[str, Any], matrices: float, others: float) -> dict[str, float]:
    return {entry["rate"]: matrices, "learning_rate": others}


def _check(what: str, entry: dict[str, Any]) -> None:
    if missing := _SECTIONS - set(entry):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}.")
    if unknown := set(entry) - _SECTIONS:
        raise ValueError(f"{what} has unknown entries: {', '.join(sorted(unknown))}.")
    for key in ("matrices", "others"):
        rates = entry[key]
        if not rates or len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
            raise ValueError(f"{what}: {key} must be different rates above 0, got {rates}.")
