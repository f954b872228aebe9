"""Activation checkpointing of a model's blocks, in whole or up to their bottlenecks, switched from phase to phase.

A model of transformers has the attribute ``gradient_checkpointing`` on every module that can have its forward pass
repeated in the backward pass, and beside it ``_gradient_checkpointing_func(function, *args)``, which calls a block in
that way. ``activation_checkpointing_enable()`` sets these two, and nothing else that a backward pass without reentrance
needs; here they are set alike, for each block on its own, and put back as they were.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_drt.config import DRTConfig
from hf_drt.forms import FactoredLinear, keep_bottlenecks
from hf_drt.targets import is_checkpointing_layer

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class Activations:
    """Switches what a model's blocks keep, as ``dense_checkpointing`` and ``recompute`` say.

    In a phase in which a layer is dense and trained, ``dense_checkpointing`` has all blocks keep their inputs alone,
    those without such a layer too: a block keeps about as much in any form, and the peak is that of all of them. In
    other phases, and without it, blocks with a factored layer keep what ``recompute`` says.

    Args:
        model: Whose blocks they are; it stays as it is until :meth:`enter`.
        config: The settings.
        options: ``gradient_checkpointing_kwargs`` of the training arguments: ``every_n_layers`` and ``offload`` as
            transformers has them, the rest for ``torch.utils.checkpoint.checkpoint``.

    Raises:
        ValueError: As :func:`checkpointing_error`.
    """

    def __init__(self, model: nn.Module, config: DRTConfig, options: Mapping[str, Any] | None = None):
        if reason := checkpointing_error(model, config, options):
            raise ValueError(reason)
        self._model, self._config = model, config
        self._every, self._repeat, self._bottleneck = _repetition(options or {})
        self._before: list[tuple[nn.Module, dict[str, Any]]] | None = None

    def enter(self, trains_dense: bool) -> None:
        """A phase has begun, and the model is in its forms.

        Args:
            trains_dense: Whether any layer is dense and trained in it by the plan.
        """
        if not _switched(self._config):
            return
        checkpoints = trains_dense and self._config.dense_checkpointing
        if self._before is None:
            self._before = [(m, _own(m)) for m in _switches(self._model)]
        blocks = 0
        for module, _ in self._before:
            in_turn = blocks % self._every == 0 or not is_checkpointing_layer(module)
            blocks += is_checkpointing_layer(module)
            self._switch(module, self._repeat if checkpoints and in_turn else self._kept_by(module))

    def _kept_by(self, module: nn.Module) -> Callable[..., Any] | None:
        """The function that calls a block which is not checkpointed as a whole; None to keep all."""
        factored = self._config.recompute == "bottleneck" and any(
            isinstance(m, FactoredLinear) for m in module.modules()
        )
        return self._bottleneck if factored else None

    def _switch(self, module: nn.Module, function: Callable[..., Any] | None) -> None:
        """What does not change is not written to: compiled code asks whether it has been."""
        for name, value in ((FUNCTION, function), (FLAG, function is not None)):
            if value is not None and getattr(module, name, None) is not value:
                setattr(module, name, value)

    def leave(self) -> None:
        """The model is as it was before the first phase; also where it is so already."""
        for module, own in self._before or ():
            for name in (FLAG, FUNCTION):
                vars(module).pop(name, None)
            vars(module).update(own)
        self._before = None


def checkpointing_error(model: nn.Module, config: DRTConfig, options: Mapping[str, Any] | None = None) -> str | None:
    """Why a model's blocks cannot be switched as the settings say, and what to do; None where they can."""
    if not (names := _switched(config)):
        return None
    found = f"{names[0]} is {getattr(config, names[0])!r}, "
    switches = _switches(model)
    if not switches or not getattr(model, "supports_gradient_checkpointing", True):
        return (
            f"{found}but {type(model).__name__} does not support activation checkpointing. Leave it out, and see "
            "dense_accumulation for another way to a smaller peak."
        )
    if any(getattr(module, FLAG) for module in switches):
        return (
            f"{found}but the model's blocks are checkpointed in every phase already. Turn activation checkpointing of "
            f"the whole run off, or leave {names[0]} out."
        )
    if (options or {}).get("use_reentrant"):
        return (
            f"{found}and activation_checkpointing_kwargs has use_reentrant=True, which needs other inputs in some "
            "phases than in others. Leave use_reentrant out, or set it to False."
        )
    return None


def _switched(config: DRTConfig) -> list[str]:
    """The settings that are on."""
    on = {"dense_checkpointing": config.dense_checkpointing, "recompute": config.recompute != "none"}
    return [name for name, value in on.items() if value]


def _switches(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, FLAG)]


def _own(module: nn.Module) -> dict[str, Any]:
    """What the object itself has of the two, and not its class."""
    return {name: value for name, value in vars(module).items() if name in (FLAG, FUNCTION)}


def _repetition(options: Mapping[str, Any]) -> tuple[int, Callable[..., Any], Callable[..., Any]]:
    """Every how many blocks one is checkpointed, the function that calls it, and the one that keeps bottlenecks."""
    rest = {name: value for name, value in options.items() if name != "use_reentrant"}
    every, offload = rest.pop("every_n_layers", 1), rest.pop("offload", False)
    whole = partial(_on_cpu if offload else checkpoint, use_reentrant=False, **rest)
    return every, whole, partial(keep_bottlenecks, **rest)


def _on_cpu(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with torch.autograd.graph.save_on_cpu(pin_memory=True, device_type=device.type if device else "cpu"):
        return checkpoint(function, *args, **options)
