"""What a trainer's run resolves its schedule by: its length, and what the run that it goes on with has measured."""

from functools import partial
from typing import Any

from hf_drt.checkpoint import read_state
from hf_drt.config import DRTConfig
from hf_drt.planning import Resolution, TargetLayers, resolution
from hf_drt.schedule import Run
from hf_drt.trainer.callback import updates_per_epoch


def resolution_of(
    trainer: Any, config: DRTConfig, layers: TargetLayers, max_steps: int, dataloader: Any, folder: str | None
) -> Resolution:
    """All of a run's plan that does not depend on the learning rate.

    Args:
        config: Settled.
        folder: The checkpoint that the run goes on from: a budget of seconds goes by those in it, which another
            machine, or a busy one, would measure otherwise.

    Raises:
        ValueError: As :func:`hf_drt.planning.resolution`.
        CheckpointError: The budget is one of seconds, and the checkpoint's state cannot be read.
    """
    run = Run(max_steps, updates_per_epoch(dataloader, trainer.args.gradient_accumulation_steps))
    return resolution(config, run, trainer.model, layers, folder is not None, partial(_paces_in, folder))


def _paces_in(folder: str | None) -> dict[str, float] | None:
    return None if folder is None else read_state(folder).get("paces")
