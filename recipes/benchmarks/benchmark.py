"""Benchmarks of dynamic-rank training against dense training and other baselines, on real data.

    python recipes/benchmarks/benchmark.py run brown_lm                       # what is missing of all methods, 3 seeds
    python recipes/benchmarks/benchmark.py run brown_lm --methods dense default --seeds 1 2 3
    python recipes/benchmarks/benchmark.py table brown_lm                     # from the records, nothing is run

A task is one file, ``tasks/<name>.json``: data, model, training arguments, and methods that change some of them. Each
run is a process of its own and adds one line to ``results/<name>.jsonl``; a run whose settings have a line there is not
made again, so that a benchmark goes on where it was killed. What it shows is in RESULTS.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from store import HERE, Store, task_file

SEEDS = (1, 2, 3)


class Missing(Exception):
    """A method is as long as another one, whose record is not there yet."""


def settings_of(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    """The settings of a run, in full; see :class:`experiment.Settings`.

    A method may change ``model`` and ``training``, name ``peft``, be ``like`` another method, and take ``as_long_as``
    another one's seconds on this machine, with the learning-rate schedule fitted to that length.

    Raises:
        ValueError: The task has no such method, or a method has an unknown section.
        Missing: It is as long as a run that has not been made.
    """
    task = task_file(name)
    methods = task["methods"]
    if method not in methods:
        raise ValueError(f"task {name} has no method {method!r}; it has {', '.join(methods)}.")
    change = methods[method]
    if unknown := set(change) - {"model", "training", "peft", "like", "as_long_as", "label"}:
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
        "measure": task["measure"],
    }
    if "as_long_as" in change:
        dense = _record(name, change.get("like", "dense"), seed, store)
        other = _record(name, change["as_long_as"], seed, store)
        share = other["cpu_seconds"] / dense["cpu_seconds"]
        settings["training"]["max_steps"] = round(share * dense["steps"])
    return settings


def _record(name: str, method: str, seed: int, store: Store) -> dict[str, Any]:
    record = store.find(method, settings_of(name, method, seed, store))
    if record is None:
        raise Missing(f"{method}, seed {seed}")
    return record


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing, seed by seed."""
    task = task_file(options.task)
    store = Store(options.results, options.task)
    for seed in options.seeds:
        for method in options.methods or task["methods"]:
            try:
                settings = settings_of(options.task, method, seed, store)
            except Missing as missing:
                print(f"{method}, seed {seed}: waits for {missing}", flush=True)
                continue
            if store.find(method, settings) is None:
                started = time.monotonic()
                record = run_apart(settings, options.cache_dir)
                store.add(method, record)
                print(
                    f"{options.task} {method}, seed {seed}: {record['value']:.4f} in {record['seconds']:.0f} s "
                    f"({record['cpu_seconds']:.0f} s of computing), {time.monotonic() - started:.0f} s in all",
                    flush=True,
                )


def run_apart(settings: dict[str, Any], cache: str) -> dict[str, Any]:
    """One run in a process of its own, so that its peak of memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "settings.json")
        request.write_text(json.dumps(settings))
        command = [sys.executable, __file__, "one", str(request), "--cache_dir", cache]
        result = subprocess.run(command, capture_output=True, text=True)
        answer = Path(folder, "record.json")
        if result.returncode or not answer.is_file():
            raise RuntimeError(f"a run failed: {json.dumps(settings)}\n{result.stderr[-3000:]}")
        return json.loads(answer.read_text())


def one(options: argparse.Namespace) -> None:
    """The process of one run."""
    from experiment import Settings
    from experiment import run as experiment

    folder = options.request.parent
    settings = Settings(**json.loads(options.request.read_text()))
    record = experiment(settings, Path(options.cache_dir).expanduser(), str(folder))
    (folder / "record.json").write_text(json.dumps(record))


def table(options: argparse.Namespace) -> None:
    """Print the table of each task, and draw its figures where asked for."""
    from tables import print_table

    for name in options.tasks:
        print_table(name, Store(options.results, name), options.seeds)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--cache_dir", default="~/.cache/hf_drt", help="Folder of data and tokenizers.")
    common.add_argument("--results", type=Path, default=HERE / "results", help="Folder of the records.")
    common.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    command = commands.add_parser("run", parents=[common], help="Make the runs that are missing.")
    command.add_argument("task")
    command.add_argument("--methods", nargs="+", help="Of the task file; all if left out.")
    command.set_defaults(call=run)
    command = commands.add_parser("table", parents=[common], help="Tables from the records.")
    command.add_argument("tasks", nargs="+")
    command.set_defaults(call=table)
    command = commands.add_parser("one", parents=[common], help=argparse.SUPPRESS)
    command.add_argument("request", type=Path)
    command.set_defaults(call=one)
    return top


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    try:
        options.call(options)
    except ValueError as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
