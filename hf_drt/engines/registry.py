"""Which engine trains a model: the one place where that is asked."""

import importlib
import sys
from typing import Any

from torch import nn

from hf_drt.engines.ddp import DDP
from hf_drt.engines.engine import Engine, uncompiled
from hf_drt.engines.single import Single
from hf_drt.forms import accept
from hf_drt.registry import Registry

# Engines whose library takes long to import, by its name: before it has been, no model can be theirs.
_ONCE_IMPORTED = {"torch.distributed.fsdp": "hf_drt.engines.fsdp2", "deepspeed": "hf_drt.engines.zero"}
# What FSDP2 makes of parameters, and the hooks by which it keeps the state dict of the layers that it manages; it, and
# hf_drt.engines.fsdp2, set these anew on others.
accept(tensors=("torch.distributed.tensor.DTensor",), hooks=("torch.distributed.fsdp.", "hf_drt.engines.fsdp2"))


class _Engines(Registry[type[Engine]]):
    """Engines by name. Those that were added last are asked first."""

    def add(self, name: str, member: type[Engine]) -> type[Engine]:
        accept(member.tensors, member.hooks)
        return super().add(name, member)


ENGINES = _Engines("engine", "hf_drt.engines", classes=True)
ENGINES.add("single", Single)
ENGINES.add("ddp", DDP)


def import_engines() -> dict[str, ImportError]:
    """Import the engines that wait for their library; what those raised that cannot be, by the library's name."""
    missing = {}
    for library, home in _ONCE_IMPORTED.items():
        try:
            importlib.import_module(home)
        except ImportError as error:
            missing[library] = error
    return missing


def parts_of_zero() -> Any:
    """The package :mod:`hf_drt.engines.zero`, which is not imported before DeepSpeed is needed.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    return importlib.import_module("hf_drt.engines.zero")


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model, or of the wrapper around it."""
    return next(engine for engine in _known() if engine.manages(uncompiled(model)))(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what an engine or torch.compile has put around it."""
    model = uncompiled(model)
    inside = next((found for engine in _known() if (found := engine.inside(model)) is not None), None)
    return model if inside is None else unwrapped(inside)


def is_wrapper(module: nn.Module) -> bool:
    """Whether an engine has put this module around a model."""
    return any(engine.inside(module) is not None for engine in _known())


def _known() -> list[type[Engine]]:
    for library, home in _ONCE_IMPORTED.items():
        if library in sys.modules:
            importlib.import_module(home)
    return [*ENGINES.values()][::-1]
