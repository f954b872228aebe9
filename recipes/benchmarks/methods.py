"""What a method of a task is: the settings of its runs."""

from functools import partial
from typing import Any

from store import Store, task_file
from tuning import SEED, rates

SECTIONS = {"model", "training", "peft", "like", "as_long_as", "label", "tuned", "trial"}


class Missing(Exception):
    """A method goes by another one, whose record is not there yet."""


def settings_of(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    """The settings of a run, in full; see :class:`experiment.Settings`.

    A method may change ``model`` and ``training``, name ``peft``, be ``like`` another method, and take ``as_long_as``
    another one's seconds on this machine, with the learning-rate schedule fitted to that length. A tuned one takes the
    best of its learning rates.

    Raises:
        ValueError: The task has no such method, or a method has an unknown section.
        Missing: It is as long as a run that has not been made, or a learning rate has not been tried.
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
        "measure": {"points": 1} if "trial" in change else task["measure"],
    }
    if tuned := change.get("tuned"):
        entry = task["tuned"]["methods"][tuned]
        loss_of = partial(trial_loss, name, store)
        settings["training"] |= rates(entry, tuned, change.get("trial", {}), loss_of)
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


def trial_loss(name: str, store: Store, trial: str) -> float:
    """The loss of the evaluation at the end of a trial (:mod:`tuning`).

    Raises:
        Missing: It has not been made.
    """
    return _record(name, trial, SEED, store)["curve"][-1]["loss"]


def _record(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    record = store.find(method, settings_of(name, method, seed, store))
    if record is None:
        raise Missing(f"{method}, seed {seed}")
    return record
