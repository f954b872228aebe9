"""Benchmarks of dynamic-rank training against dense training and other baselines, on real data.

    python recipes/benchmarks/benchmark.py run brown_lm                       # what is missing of all methods, 3 seeds
    python recipes/benchmarks/benchmark.py run brown_lm --methods dense default --seeds 1 2 3
    python recipes/benchmarks/benchmark.py pilot brown_lm_wide                # what an update step of each method takes
    python recipes/benchmarks/benchmark.py table brown_lm                     # from the records, nothing is run
    python recipes/benchmarks/benchmark.py table brown_lm --memory            # bytes of every phase
    python recipes/benchmarks/benchmark.py table brown_lm_rates --rates       # losses of the learning rates tried
    python recipes/benchmarks/benchmark.py plot brown_lm --output plots

A task is one file, ``tasks/<name>.json``: data, model, training arguments, and methods that change some of them. Each
run is a process of its own and adds one line to ``results/<name>.jsonl``; a run whose settings have a line there is not
made again, so that a benchmark goes on where it was killed. What it shows is in RESULTS.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

from methods import REFERENCE, Missing, pilot_settings, pilot_store, pilots, settings_of, timed
from store import HERE, Store, task_file
from tuning import SEED

SEEDS = (1, 2, 3)


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing: those that wait for others after them, until none can be made any more."""
    store = Store(options.results, options.task)
    most = os.cpu_count() or 1
    if not 1 <= options.jobs <= most:
        raise ValueError(f"--jobs must be from 1 to {most}, the cores of this machine, got {options.jobs}.")
    with ThreadPoolExecutor(options.jobs) as pool:
        cores: Queue[int] = Queue()
        for core in range(options.jobs):
            cores.put(core)
        said: set[str] = set()
        while missing := list(missing_runs(options, store, said)):
            finish = partial(_finish, options, store, cores)
            for done in [pool.submit(finish, *work) for work in missing]:
                done.result()


Work = tuple[str, dict[str, Any]]


def missing_runs(options: argparse.Namespace, store: Store, said: set[str]) -> Iterator[Work]:
    """Methods and settings of the runs that are missing and can be made, seed by seed; ``said`` are the messages about
    others that have been printed."""
    task = task_file(options.task)
    for seed in options.seeds:
        for method in options.methods or task["methods"]:
            if "trial" in task["methods"].get(method, {}) and seed != SEED:
                continue
            try:
                settings = settings_of(options.task, method, seed, store)
            except Missing as missing:
                if (text := f"{method}, seed {seed}: waits for {missing}") not in said:
                    print(text, flush=True)
                    said.add(text)
                continue
            if store.find(method, settings) is None:
                yield method, settings


def _finish(
    options: argparse.Namespace, store: Store, cores: "Queue[int]", method: str, settings: dict[str, Any]
) -> None:
    """Make a run on a core of its own, and keep its record."""
    core, started = cores.get(), time.monotonic()
    try:
        record = run_apart(settings, options.cache_dir, core)
    finally:
        cores.put(core)
    store.add(method, record)
    print(
        f"{options.task} {method}, seed {settings['seed']}: {record['value']:.4f} in {record['seconds']:.0f} s "
        f"({record['cpu_seconds']:.0f} s of computing), {time.monotonic() - started:.0f} s in all",
        flush=True,
    )


def run_apart(settings: dict[str, Any], cache: str, core: int) -> dict[str, Any]:
    """One run in a process of its own, so that its peak of memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(settings, folder, cache, "--core", str(core))
        result = subprocess.run(command, capture_output=True, text=True)
        answer = Path(folder, "record.json")
        if result.returncode or not answer.is_file():
            raise RuntimeError(f"a run failed: {json.dumps(settings)}\n{result.stderr[-3000:]}")
        return json.loads(answer.read_text())


def command_of(settings: dict[str, Any], folder: str, cache: str, *flags: str) -> list[str]:
    """The command of a run's process, which writes ``record.json`` into the folder."""
    request = Path(folder, "settings.json")
    request.write_text(json.dumps(settings))
    return [sys.executable, __file__, "one", str(request), "--cache_dir", cache, *flags]


def pilot(options: argparse.Namespace) -> None:
    """Time the update steps of those methods that no pilot has timed, side by side, and beside those of dense."""
    from pilot import measured

    store = Store(options.results, options.task)
    kept = pilot_store(options.task, store)
    known = task_file(options.task)["methods"]
    names = {timed(options.task, method) for method in options.methods or known}
    names = {method for method in names if not pilots(options.task, method, store)}
    if not names:
        print(f"{options.task}: all have been timed; delete their lines in {kept.path} to time them again")
        return
    names |= {REFERENCE} & known.keys()
    settings = {method: pilot_settings(options.task, method) for method in sorted(names)}
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        for method in settings:
            Path(folder, method).mkdir()
        commands = {
            method: command_of(own, str(Path(folder, method)), options.cache_dir, "--turns")
            for method, own in settings.items()
        }
        answers = {method: Path(folder, method, "record.json") for method in settings}
        for method, record in measured(commands, answers):
            kept.add(method, {"pilot": began, **record})
            steps = ", ".join(f"{p['kind']} {p['step_seconds']:.3f}" for p in record["phases"])
            print(f"{options.task} {method}: {steps} s of computing a step", flush=True)


def one(options: argparse.Namespace) -> None:
    """The process of one run."""
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[options.core % len(cores)]})
    import torch
    from experiment import Settings
    from experiment import run as experiment
    from pilot import Turns

    torch.set_num_threads(1)
    folder = options.request.parent
    settings = json.loads(options.request.read_text())
    turns = Turns(settings["measure"]["turn"]) if options.turns else None
    record = experiment(Settings(**settings), Path(options.cache_dir).expanduser(), str(folder), turns)
    (folder / "record.json").write_text(json.dumps({"settings": settings, **record}))


def table(options: argparse.Namespace) -> None:
    """Print the table of each task, or that of its memory or its learning rates."""
    from tables import chosen, print_memory, print_table
    from tuned_tables import print_rates, print_tuned

    for name in options.tasks:
        whole = print_tuned if "tuned" in task_file(name) else print_table
        show = print_memory if options.memory else print_rates if options.rates else whole
        show(name, Store(options.results, name), options.seeds, chosen(name, options.methods, options.but))


def plot(options: argparse.Namespace) -> None:
    """Draw the pictures of each task."""
    try:
        from plots import write_plots
        from tables import chosen
    except ModuleNotFoundError as error:
        raise ValueError(f"plot needs {error.name}. Run: pip install 'hf-drt[report]'") from None
    for name in options.tasks:
        shown = chosen(name, options.methods, options.but) if options.methods or options.but else None
        for path in write_plots(name, Store(options.results, name), options.seeds, options.output, shown):
            print(path)


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
    command.add_argument("--jobs", type=int, default=1, help="Runs at a time, each on a core of its own.")
    command.set_defaults(call=run)
    command = commands.add_parser(
        "pilot", parents=[common], help="Time the update steps of methods that have not been."
    )
    command.add_argument("task")
    command.add_argument("--methods", nargs="+", help="Of the task file; all if left out.")
    command.set_defaults(call=pilot)
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument(
        "--methods", nargs="+", help="Of the task file, by name or pattern; all but trials if left out."
    )
    choice.add_argument("--except", dest="but", nargs="+", help="Methods that are left out, by name or pattern.")
    command = commands.add_parser("table", parents=[common, choice], help="Tables from the records.")
    command.add_argument("tasks", nargs="+")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="Bytes of the tensors and peak, by phase.")
    kind.add_argument("--rates", action="store_true", help="Losses of the learning rates that were tried.")
    command.set_defaults(call=table)
    command = commands.add_parser("plot", parents=[common, choice], help="Pictures from the records.")
    command.add_argument("tasks", nargs="+")
    command.add_argument("--output", type=Path, required=True, help="Folder of the PNGs.")
    command.set_defaults(call=plot)
    command = commands.add_parser("one", parents=[common], help=argparse.SUPPRESS)
    command.add_argument("request", type=Path)
    command.add_argument("--core", type=int)
    command.add_argument("--turns", action="store_true")
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
