"""``python -m tests.sweep``."""

import argparse
import contextlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers

from tests.sweep.attempt import PASSED, Result
from tests.sweep.catalog import model_types
from tests.sweep.pool import sweep
from tests.sweep.table import summary


def main(arguments: list[str] | None = None) -> int:
    """Sweep and print the table; 2 if no model type is named."""
    options = _parser().parse_args(arguments)
    types = {name: cls for name, cls in model_types().items() if re.search(options.only or "", name)}
    if not types:
        print(f"--only {options.only!r} matches none of the model types, such as llama or bert.", file=sys.stderr)
        return 2
    done = _stored(options.output) if options.resume else {}
    done = {name: result for name, result in done.items() if name in types}
    left = [(name, cls) for name, cls in types.items() if name not in done]
    with options.output.open("a" if options.resume else "w") as file, _quiet():
        for result in sweep(left, options.jobs, options.timeout):
            done[result.model_type] = result
            file.write(json.dumps(result.as_json()) + "\n")
            file.flush()
            if options.verbose or sys.stderr.isatty():
                print(f"{len(done)}/{len(types)} {result.model_type}: {result.outcome} {result.cause}", file=sys.stderr)
    print(summary(list(done.values())))
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What hundreds of models log and warn of is left out; a caller's own settings come back."""
    verbosity, level = transformers.logging.get_verbosity(), logging.getLogger("hf_drt").level
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_drt").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        logging.getLogger("hf_drt").setLevel(level)
        if bar:
            transformers.logging.enable_progress_bar()


def _stored(path: Path) -> dict[str, Result]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {r.model_type: r for r in (Result(**json.loads(line)) for line in lines) if r.outcome == PASSED}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sweep",
        description="Takes a tiny model of every architecture of the installed transformers through all forms.",
    )
    parser.add_argument("--only", metavar="REGEX", help="model types in which the regular expression is found")
    parser.add_argument("--output", type=Path, default=Path("sweep.jsonl"), help="one JSON line a type")
    parser.add_argument("--resume", action="store_true", help="keep what --output says has passed, try the rest")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one type")
    parser.add_argument("--verbose", action="store_true", help="a line for each type on standard error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
