"""Methods whose two learning rates are tuned: that of the target layers' matrices, and that of all other weights.

A task's section ``tuned`` gives each of them candidates for both. They are tried one after the other, in runs of a
share of the length and with one seed: first the others' rates beside the first of the matrices', then the
matrices' rates beside the best of those. Each time the best is the one whose run ends with the lowest loss of the
evaluation.
"""

from collections.abc import Callable
from typing import Any

SEED = 1  # of all trials
_SECTIONS = {"training", "rate", "matrices", "others"}

Loss = Callable[[str], float]  # gives the loss at the end of a trial, by its name


def tuned_methods(name: str, section: dict[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """The methods of a task's section ``tuned``: each, and its trials ``<method>_o<rate>`` and ``<method>_m<rate>``.

    The section is ``{"share": s, "methods": {...}}``; a method of it ``{"training": {...}, "rate": argument,
    "matrices": [...], "others": [...]}``. ``rate`` names the training argument that is the matrices' rate.

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
        short = {"training": entry["training"] | {"max_steps": round(share * steps)}}
        for rate in entry["others"]:
            made[f"{method}_o{rate:g}"] = short | {
                "trial": {"matrices": guess(entry), "others": rate},
                "tuned": method,
            }
        for rate in entry["matrices"]:
            if rate != guess(entry):  # which has been tried beside all others
                made[f"{method}_m{rate:g}"] = short | {"trial": {"matrices": rate}, "tuned": method}
        made[method] = {"training": entry["training"], "tuned": method}
    return made


def guess(entry: dict[str, Any]) -> float:
    """The matrices' rate beside which those of the others are tried."""
    return entry["matrices"][0]


def rates(entry: dict[str, Any], method: str, trial: dict[str, float], loss_of: Loss) -> dict[str, float]:
    """The training arguments of a trial, or of the method itself (an empty trial): what it leaves open is the best so
    far."""
    others = trial["others"] if "others" in trial else best_others(entry, method, loss_of)
    matrices = trial["matrices"] if "matrices" in trial else _best_matrices(entry, method, others, loss_of)
    return {entry["rate"]: matrices, "learning_rate": others}


def best_others(entry: dict[str, Any], method: str, loss_of: Loss) -> float:
    """The best rate of the other weights beside the first of the matrices."""
    return min(entry["others"], key=lambda rate: loss_of(f"{method}_o{rate:g}"))


def trial_name(entry: dict[str, Any], method: str, matrices: float, others: float) -> str:
    """Name of the trial of a rate of the matrices beside the best of the others."""
    return f"{method}_o{others:g}" if matrices == guess(entry) else f"{method}_m{matrices:g}"


def _best_matrices(entry: dict[str, Any], method: str, others: float, loss_of: Loss) -> float:
    return min(entry["matrices"], key=lambda rate: loss_of(trial_name(entry, method, rate, others)))


def _check(what: str, entry: dict[str, Any]) -> None:
    if missing := _SECTIONS - set(entry):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}.")
    if unknown := set(entry) - _SECTIONS:
        raise ValueError(f"{what} has unknown entries: {', '.join(sorted(unknown))}.")
    for key in ("matrices", "others"):
        rates = entry[key]
        if not rates or len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
            raise ValueError(f"{what}: {key} must be different rates above 0, got {rates}.")
