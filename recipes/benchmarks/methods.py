"""What a method of a task is: the settings of its runs."""

from functools import partial
from typing import Any

from store import Store, task_file
from tuning import SEED, rates

SECTIONS = {
    "model", "training", "peft", "extras", "like", "as_long_as", "in_seconds_of", "times", "timed_as", "label",
    "tuned", "trial", "pilot_steps",
}  # fmt: skip
EXTRAS = {"guide", "profile", "project", "widened"}  # of :mod:`extras`
LENGTHS = {"as_long_as", "in_seconds_of", "times", "label", "like"}
PILOT_STEPS, TURN_STEPS = 20, 5
REFERENCE = "dense"  # is in every pilot


class Missing(Exception):
    """A method goes by another one, whose record is not there yet."""


def settings_of(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    """The settings of a run, in full; see :class:`experiment.Settings`.

    A method may change ``model`` and ``training``, name ``peft``, have ``extras``, be ``like`` another method, and take
    as many seconds as another one, with the learning-rate schedule fitted to that length: ``as_long_as`` that one's run
    on this machine, or ``in_seconds_of`` it, or a multiple of that (``times``), by the seconds of an update step that a
    pilot has measured (:mod:`pilot`), of ``pilot_steps`` steps. A tuned one takes the best of its learning rates.

    Raises:
        ValueError: The task has no such method, or a method has an unknown section.
        Missing: It is as long as a run that has not been made, a learning rate has not been tried, or there was no
            pilot.
    """
    change = change_of(name, method)
    settings = base_settings(name, method) | {"seed": seed}
    if tuned := tuned_as(name, method):
        entry = task_file(name)["tuned"]["methods"][tuned]
        loss_of = partial(trial_loss, name, store)
        settings["training"] |= rates(entry, tuned, change.get("trial"), loss_of)
    if "as_long_as" in change:
        dense = _record(name, change.get("like", "dense"), seed, store)
        other = _record(name, change["as_long_as"], seed, store)
        share = other["cpu_seconds"] / dense["cpu_seconds"]
        settings["training"]["max_steps"] = round(share * dense["steps"])
    if "in_seconds_of" in change:
        other = change["in_seconds_of"]
        seconds = seconds_of(name, other, settings_of(name, other, seed, store)["training"]["max_steps"], store)
        # The warm-up stays: a shorter one is far worse at the rates that a third of the length has found best.
        settings["training"]["max_steps"] = round(change.get("times", 1) * seconds / step_seconds(name, method, store))
    return settings


def change_of(name: str, method: str) -> dict[str, Any]:
    """A method's entry in the task.

    Raises:
        ValueError: The task has no such method, or it has an unknown section.
    """
    methods = task_file(name)["methods"]
    if method not in methods:
        raise ValueError(f"task {name} has no method {method!r}; it has {', '.join(methods)}.")
    if unknown := set(methods[method].get("extras", {})) - EXTRAS:
        raise ValueError(f"method {method!r} of {name} has unknown extras: {', '.join(sorted(unknown))}.")
    if unknown := set(methods[method]) - SECTIONS:
        raise ValueError(f"method {method!r} of {name} has unknown sections: {', '.join(sorted(unknown))}.")
    return methods[method]


def base_settings(name: str, method: str) -> dict[str, Any]:
    """The settings of a method but for seed, tuned rates and fitted length."""
    task, change = task_file(name), change_of(name, method)
    base = base_settings(name, change["like"]) if "like" in change else task
    settings = {
        "task": name,
        "kind": task["kind"],
        "model": base["model"] | change.get("model", {}),
        "data": task["data"],
        "training": base["training"] | change.get("training", {}),
        "peft": change.get("peft", base.get("peft")),
        "measure": {"points": 1} if "trial" in change else task["measure"],
    }
    extras = base.get("extras", {}) | change.get("extras", {})
    return settings | ({"extras": extras} if extras else {})


def tuned_as(name: str, method: str) -> str | None:
    """The tuned method whose rates a method has: its own, or those of the one that it is like."""
    change = change_of(name, method)
    return change.get("tuned") or (tuned_as(name, change["like"]) if "like" in change else None)


# ---- the seconds of a step


def timed(name: str, method: str) -> str:
    """The method whose update steps a method's steps are, apart from its rates: itself, the one that it is like where
    they differ in length alone, or the one that it names (``timed_as``)."""
    change = change_of(name, method)
    if "timed_as" in change:
        return timed(name, change["timed_as"])
    if "trial" in change:
        return change["tuned"]
    return timed(name, change["like"]) if "like" in change and set(change) <= LENGTHS else method


def pilot_settings(name: str, method: str) -> dict[str, Any]:
    """Of the short run in which a method's update steps are timed."""
    settings = base_settings(name, timed(name, method))
    short = {"max_steps": _pilot_steps(name, timed(name, method)), "warmup_steps": 2}
    measure = {"points": 1, "turn": TURN_STEPS}
    return settings | {"training": settings["training"] | short, "seed": SEED, "measure": measure}


def _pilot_steps(name: str, method: str) -> int:
    """Its own, or those of the method that it is like: a method of many phases needs more, for each of them some."""
    change = change_of(name, method)
    if "pilot_steps" in change or "like" not in change:
        return change.get("pilot_steps", PILOT_STEPS)
    return _pilot_steps(name, change["like"])


def step_seconds(name: str, method: str, store: Store) -> float:
    """CPU seconds of an update step, the mean over the phases of a run; from the first pilot that the method was in.

    A later pilot has met the machine in another state. What it says is taken relative to its steps of dense training,
    and told in those of the first.

    Raises:
        Missing: There was none.
    """
    record = next(iter(pilots(name, method, store)), None)
    if record is None:
        raise Missing(f"the pilot of {timed(name, method)}: benchmark.py pilot {name}")
    references = pilots(name, REFERENCE, store) if REFERENCE in task_file(name)["methods"] else []
    beside = [r for r in references if r.get("pilot") == record.get("pilot")]
    scale = _mean_step(references[0]) / _mean_step(beside[0]) if beside else 1.0
    return scale * _mean_step(record)


def pilots(name: str, method: str, store: Store) -> list[dict[str, Any]]:
    """The records of a method's pilots, the oldest first."""
    return pilot_store(name, store).all_of(timed(name, method), pilot_settings(name, method))


def _mean_step(record: dict[str, Any]) -> float:
    phases = record["phases"]
    return sum(p["steps"] * p["step_seconds"] for p in phases) / sum(p["steps"] for p in phases)


def seconds_of(name: str, method: str, steps: int, store: Store) -> float:
    """CPU seconds of a run of so many update steps, by the pilot."""
    return steps * step_seconds(name, method, store)


def pilot_store(name: str, store: Store) -> Store:
    """The records of the pilot, beside those of the runs."""
    return Store(store.path.parent, f"{name}-pilot")


# ---- records


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
