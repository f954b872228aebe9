"""A training within a call: what the Trainer does to a model and to the process ends with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_drt.trainer import untouched


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """After the block nothing of the model but the values of its parameters has changed, nor any random generator.

    The Trainer seeds all generators and turns ``use_cache`` off in the configuration; Accelerate puts an autocast
    around the model's ``forward``, which would stay. What an earlier trainer's Accelerate has put there is away
    meanwhile: it would decide what this training computes in. Layers with running statistics are in evaluation mode:
    their statistics are those of the model as it was, by which it is judged.
    """
    config: Any = getattr(model, "config", None)
    settings = vars(config) if hasattr(config, "__dict__") else {}
    kept = {name: settings[name] for name in ("use_cache",) if name in settings}
    with untouched(model):
        vars(model).pop("_is_accelerate_prepared", None)
        if (original := vars(model).pop("_original_forward", None)) is not None:
            vars(model)["forward"] = original
        for module in model.modules():
            if module._buffers.get("running_mean") is not None:
                module.register_forward_pre_hook(_evaluated)
        try:
            yield
        finally:
            settings.pop("use_cache", None)
            settings.update(kept)


def _evaluated(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.eval()
