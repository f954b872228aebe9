"""What the mixin sets aside around a method of the Trainer, and puts back."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hf_drt.forms import AdapterLinear


def upcast_bases(model: nn.Module) -> None:
    """Under mixed precision Accelerate keeps what is trainable in float32, and FSDP wants one dtype for it in a block;
    an adapter's base is frozen now and trainable later. One that is kept in fewer bits makes a new weight then."""
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.form.dtype is None:
            base = module.get_parameter("base")
            base.data = base.data.float()


@contextlib.contextmanager
def hidden_token(args: Any) -> Iterator[None]:
    """``training_args.bin`` is published: it must not hold ``hub_token``."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


@contextlib.contextmanager
def metrics_set_aside(trainer: Any) -> Iterator[None]:
    """Log a row of ours alone: TRL's trainers add to any row the metrics of the steps since the last one, and forget
    them, so that their own row would lack them."""
    gathered = getattr(trainer, "_metrics", None)
    if not isinstance(gathered, dict) or not all(isinstance(metrics, dict) for metrics in gathered.values()):
        yield
        return
    trainer._metrics = {mode: {} for mode in gathered}
    try:
        yield
    finally:
        trainer._metrics = gathered


def kept_attributes(holder: Any, *names: str) -> Callable[[], None]:
    """The returned function gives an object the attributes that it has now."""
    values = {name: getattr(holder, name) for name in names}

    def restore() -> None:
        for name, value in values.items():
            setattr(holder, name, value)

    return restore
