# ruff: noqa: E402
"""Run offline, on one thread a process, with caches of its own, without the messages of libraries under test."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Matrices this small gain nothing from a second thread, and lose much where another process wants the core: a second
# worker of pytest-xdist does, and so do the processes that tests start, which inherit this. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# Metrics and modules of code are copied there, and two workers would at once: a cache for each, and for what it starts.
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if Path(os.environ["HF_HOME"]).name != worker:
    os.environ["HF_HOME"] = str(Path(os.environ["HF_HOME"], worker))

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A grid of long runs under ``@pytest.mark.sampled(n)``: n of its cases, evenly spaced from the first on, are for
    every change; the others carry the slow marker."""
    grids: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            grids.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for cases in grids.values():
        (count,) = cases[0].get_closest_marker("sampled").args
        kept = {index * len(cases) // count for index in range(count)}
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Every training ends in a ``gc.collect()``, and a third of a tiny one's time was to look through what the imports
    have made."""
    gc.collect()
    gc.freeze()
