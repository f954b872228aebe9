"""A train() that fails before its loop begins leaves model, optimizer and trainer as they were.

One that resumes and fails later leaves the model that the checkpoint holds.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_drt.checkpoint import CheckpointError
from hf_drt.controller import DynamicRank
from hf_drt.engines import engine_of
from hf_drt.optim import remembered
from hf_drt.trainer.aside import kept_attributes


@contextlib.contextmanager
def as_it_was_on_failure(trainer: Any, controller: DynamicRank) -> Iterator[None]:
    """If the block raises, the layers that the model has now come back, bit for bit, with what the trainer held of
    optimizer and scheduler. Not for a model that has been sharded in it: its parameters are gone.

    The old layers live until the end of the block. Where nothing but a first phase is put in force that costs nothing:
    a change of form keeps them until its low-rank parts are made, and there is no optimizer state yet.
    """
    if engine_of(controller.model).sharded:
        yield
        return
    layers = controller.remembered()
    optimizer = remembered(trainer.optimizer) if trainer.optimizer is not None else None
    attributes = kept_attributes(trainer, "optimizer", "lr_scheduler", "_created_lr_scheduler", "model_wrapped")
    try:
        yield
    except BaseException:
        if not engine_of(controller.model).sharded:
            attributes()
            layers()
            if optimizer is not None:
                optimizer()
        raise


@contextlib.contextmanager
def loaded_in_full(controller: DynamicRank, folder: str) -> Iterator[None]:
    """After the block, in which a checkpoint's structure is restored and its weights are loaded, no target layer has
    been left without its weights: a library may load in a way of its own, and go on where that fails.

    Raises:
        CheckpointError: Some have.
    """
    yield
    if engine_of(controller.model).sharded:
        return
    parameters = controller.model.named_parameters()
    ours = ((name, p) for name, p in parameters if name.startswith(tuple(controller.targets)))
    missing = [name for name, p in ours if not p.is_meta and torch.isnan(p).all()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of the model were not loaded from {folder}, such as {missing[0]}: the trainer's "
            "own way of loading has failed, or has passed over them. Resume from another checkpoint."
        )
