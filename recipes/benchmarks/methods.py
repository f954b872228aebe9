"""What a method of a task is: the settings of its runs."""

from typing import Any

from store import Store, task_file
from tuning import SEED, best_rates

SECTIONS = {"model", "training", "peft", "like", "as_long_as", "label", "point_of", "best_of"}


class Missing(Exception):
    """A method goes by another one, whose record is not there yet."""


def settings_of(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    """The settings of a run, in full; see :class:`experiment.Settings`.

    A method may change ``model`` and ``training``, name ``peft``, be ``like`` another method, and take ``as_long_as``
    another one's seconds on this machine, with the learning-rate schedule fitted to that length. A tuned one takes the
    best rates of its grid.

    Raises:
        ValueError: The task has no such method, or a method has an unknown section.
        Missing: It is as long as a run that has not been made, or its grid is not complete.
    """
    task = task_file(name)
    methods = task["methods"]
    if method not in methods:
        raise ValueError(f"task {name} has no method {method!r}; it has {', '.join(methods)}.")
    change = methods[method]
    if unknown := set(change) - SECTIONS:
        raise ValueError(f"method {method!r} of {name} has unknown sections: {', '.join(sorted(unknown))}.")
    base = settings_of(name, change["like"], seed, store) if "like" in change else task
    settings = {
        "task": name,
        "kind": task["kind"],
        "model": base["model"] | change.get("model", {}),
        "data": task["data"],
        "training": base["training"] | change.get("training", {}),
        "peft": change.get("peft", base.get("peft")),
        "seed": seed,
        "measure": {"points": 1} if "point_of" in change else task["measure"],
    }
    if "best_of" in change:
        rates = best_rates(method, change["best_of"], lambda point: final_loss(_record(name, point, SEED, store)))
        settings["training"] |= rates
    if "as_long_as" in change:
        dense = _record(name, change.get("like", "dense"), seed, store)
        other = _record(name, change["as_long_as"], seed, store)
        share = other["cpu_seconds"] / dense["cpu_seconds"]
        settings["training"]["max_steps"] = round(share * dense["steps"])
    return settings


def record_of(name: str, method: str, seed: int, store: Store) -> dict[str, Any] | None:
    """The record of a run; None if it has not been made, or cannot be made yet."""
    try:
        return store.find(method, settings_of(name, method, seed, store))
    except Missing:
        return None


def final_loss(record: dict[str, Any]) -> float:
    """The loss of the evaluation at the end."""
    return record["curve"][-1]["loss"]


def _record(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    record = store.find(method, settings_of(name, method, seed, store))
    if record is None:
        raise Missing(f"{method}, seed {seed}")
    return record
