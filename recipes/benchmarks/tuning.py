"""Methods whose two learning rates are tuned: that of the target layers' matrices, and that of all other weights.

A task's section ``tuned`` gives each of them candidates for both. Every pair of them is tried, in a run of a share of
the length and with one seed; the best is the pair whose run ends with the lowest loss of the evaluation.
"""

import itertools
from collections.abc import Callable
from typing import Any

SEED = 1  # of all trials
_SECTIONS = {"training", "rate", "matrices", "others"}

Loss = Callable[[str], float]  # gives the loss at the end of a trial, by its name
Pair = tuple[float, float]  # the rate of the matrices, and that of the other weights


def tuned_methods(name: str, section: dict[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """The methods of a task's section ``tuned``: each, and its trials ``<method>_m<rate>_o<rate>``.

    The section is ``{"share": s, "methods": {...}}``; a method of it ``{"training": {...}, "rate": argument,
    "matrices": [...], "others": [...]}``, with ``model`` where it trains another one, ``pairs`` where not the whole
    grid is tried, and ``pilot_steps`` where its pilot takes more. ``rate`` names the training argument that is the
    matrices' rate.

    Args:
        name: Of the task, for messages.
        steps: Update steps of the full length, of which a trial makes the share s, in (0, 1].

    Raises:
        ValueError: An entry is missing, unknown, or outside its interval.
    """
    share, methods = section.get("share"), section.get("methods", {})
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"tuned of {name}: share must be in (0, 1], got {share!r}.")
    made: dict[str, dict[str, Any]] = {}
    for method, entry in methods.items():
        _check(f"tuned method {method!r} of {name}", entry)
        whole = {key: entry[key] for key in ("training", "model", "label", "pilot_steps") if key in entry}
        short = whole | {"training": entry["training"] | {"max_steps": round(share * steps)}}
        for pair in pairs_of(entry):
            made[trial_name(method, pair)] = short | {"trial": pair, "tuned": method}
        made[method] = whole | {"tuned": method}
    return made


def pairs_of(entry: dict[str, Any]) -> list[Pair]:
    """The grid: every rate of the matrices beside every one of the others, or those pairs that are named."""
    grid = list(itertools.product(entry["matrices"], entry["others"]))
    return [(matrices, others) for matrices, others in entry.get("pairs", grid)]


def trial_name(method: str, pair: Pair) -> str:
    """Name of the trial of a pair of rates."""
    return f"{method}_m{pair[0]:g}_o{pair[1]:g}"


def rates(entry: dict[str, Any], method: str, trial: Pair | None, loss_of: Loss) -> dict[str, float]:
    """The training arguments of a trial, or of the method itself, which has the best pair."""
    matrices, others = trial or best_pair(entry, method, loss_of)
    return {entry["rate"]: matrices, "learning_rate": others}


def best_pair(entry: dict[str, Any], method: str, loss_of: Loss) -> Pair:
    """The pair of rates whose trial ended with the lowest loss."""
    return min(pairs_of(entry), key=lambda pair: loss_of(trial_name(method, pair)))


def _check(what: str, entry: dict[str, Any]) -> None:
    if missing := _SECTIONS - set(entry):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}.")
    if unknown := set(entry) - _SECTIONS - {"model", "label", "pairs", "pilot_steps"}:
        raise ValueError(f"{what} has unknown entries: {', '.join(sorted(unknown))}.")
    for key in ("matrices", "others"):
        rates = entry[key]
        if not rates or len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
            raise ValueError(f"{what}: {key} must be different rates above 0, got {rates}.")
    grid = list(itertools.product(entry["matrices"], entry["others"]))
    if outside := [pair for pair in entry.get("pairs", ()) if tuple(pair) not in grid]:
        raise ValueError(f"{what}: pairs must be of matrices and others, got {outside}.")
