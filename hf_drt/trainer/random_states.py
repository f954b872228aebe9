"""Random states of processes that a checkpoint's run did not have.

The Trainer leaves such a process at the state of the seed, with which all processes begin alike. Here it goes on with
that of one which was there, as it would have without the interruption: process i with that of process i mod n.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from hf_drt.trainer.checkpoint import random_state_file

logger = logging.getLogger(__name__)

_HOST = ("python", "numpy", "cpu")


@contextlib.contextmanager
def random_states(folder: str | None, args: TrainingArguments, looks: bool = True) -> Iterator[str | None]:
    """A folder in which the Trainer finds this process' random state under the name that it looks for.

    Args:
        folder: The checkpoint, or None.
        args: Of the run.
        looks: Whether to look for it at all, or leave all to the Trainer.
    """
    name = random_state_file(args.process_index, args.world_size)
    found = list(Path(folder).glob("rng_state*.pth")) if folder is not None and looks else []
    found.sort(key=lambda path: (len(path.name), path.name))
    if folder is None or not found or Path(folder, name).is_file():
        yield folder
        return
    source = found[args.process_index % len(found)]
    logger.info("%s has no %s: process %d takes %s.", folder, name, args.process_index, source.name)
    with tempfile.TemporaryDirectory() as made:
        with safe_globals():
            states = torch.load(source, weights_only=True)
        torch.save(_as_here(states, args.world_size > 1), Path(made, name))
        yield made


def _as_here(states: dict[str, Any], several: bool) -> dict[str, Any]:
    """A process among several holds the states of all devices that it sees, one by itself that of its device."""
    return {key: value if key in _HOST else _of_devices(key, value, several) for key, value in states.items()}


def _of_devices(kind: str, value: Any, several: bool) -> Any:
    states = [value] if torch.is_tensor(value) else list(value)
    devices = getattr(torch, kind, None)
    if devices is None or not states:
        return value
    if not several:
        return states[devices.current_device() % len(states)]
    return [states[index % len(states)] for index in range(devices.device_count())]
