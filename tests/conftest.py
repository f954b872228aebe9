"""Run offline, on few threads, without the messages of libraries under test."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.disable_progress_bar()
    # Matrices this small gain nothing from a second thread, and lose much where another process wants the core.
    torch.set_num_threads(1)
