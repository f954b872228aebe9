"""The interface of an engine: how the processes of a run hold a model's parameters while it trains."""

import contextlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped; any other as it is."""
    return getattr(model, "_orig_mod", model)


def whole_size(parameter: Tensor) -> int:
    """Elements of the whole parameter; of one that ZeRO-3 has partitioned torch says 0."""
    return getattr(parameter, "ds_numel", parameter.numel())


def trainable_size(model: nn.Module) -> int:
    """Elements of all whole parameters with gradients."""
    return sum(whole_size(p) for p in model.parameters() if p.requires_grad)


class Engine(ABC):
    """What a change of form, and whatever else looks at a model's weights, asks of the engine that trains it.

    :func:`hf_drt.engines.engine_of` makes one, of the classes in :data:`hf_drt.engines.ENGINES`, for one model and one
    piece of work: it may remember what it has looked up, but nothing is kept in it from one change of form to the next.
    What says *collective* has to be called by all processes in the same order.

    Args:
        model: The model, which layers have their names in, be it compiled; for :meth:`around_switch` the engine's own
            wrapper around it, if it has one.

    Attributes:
        help: What it is, in half a sentence.
        sharded: Whether a process holds a part of each parameter only, and has room for one whole layer at a time.
        computes_in_switch: Whether the model can be called within :meth:`around_switch`.
        tensors: Qualified names of the classes that its parameters have, beside ``nn.Parameter``.
        hooks: Beginnings of the names of modules whose state-dict hooks on a layer are the engine's, not the layer's.
    """

    help: ClassVar[str]
    sharded: ClassVar[bool]
    computes_in_switch: bool = True
    tensors: ClassVar[tuple[str, ...]] = ()
    hooks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    @abstractmethod
    def manages(cls, model: nn.Module) -> bool:
        """Whether the model, or a part of it, is trained by this engine."""

    @classmethod
    @abstractmethod
    def inside(cls, module: nn.Module) -> nn.Module | None:
        """The model that a wrapper of this engine's has inside; None of any other module."""

    @classmethod
    def begun(cls, model: nn.Module) -> nn.Module:
        """A model with plain parameters as the engine trains it in a hand-written loop, which calls ``backward()`` and
        ``step()`` itself; for a trial (:mod:`hf_drt.doctor`). Collective, in a process group that is there.

        Raises:
            NotImplementedError: The engine's library makes more of a loop than that.
        """
        raise NotImplementedError(f"{cls.__name__} is begun by its own library, with a configuration of that")

    @classmethod
    def trainer_settings(cls) -> dict[str, dict[str, Any]]:
        """Settings of a Trainer that begins this engine, by a name for each way; for a trial with small weights
        (:mod:`hf_drt.doctor`), where a hand-written loop does not begin it. Empty if there are none."""
        return {}

    # ---- what a process holds

    def device(self, tensor: Tensor) -> torch.device:
        """Where the whole of a parameter is computed with, and over which processes talk about it."""
        return tensor.device

    @abstractmethod
    def held(self, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter."""

    @abstractmethod
    def full(self, value: Any) -> Any:
        """The whole of a parameter, or of a tensor laid out as one is; anything else as it is. Collective."""

    @abstractmethod
    def whole(self, layer: nn.Module) -> nn.Module:
        """The layer with whole, plain parameters: itself where it has them, else a copy. Collective."""

    def whole_on(self, layer: nn.Module, process: int) -> nn.Module | None:
        """:meth:`whole` of a layer that one process alone needs, by its rank; None on others may spare them the memory.
        Collective."""
        return self.whole(layer)

    @abstractmethod
    def like(self, value: Any, weight: Tensor) -> Any:
        """A whole tensor, equal on all processes, laid out as a parameter is; a number or scalar as it is."""

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """A block in which every parameter has its whole shape, for those who look at a model's layers."""
        return contextlib.nullcontext()

    # ---- a change of form

    @abstractmethod
    def admit(self, layers: list[nn.Module]) -> None:
        """Get ready for these layers to be replaced.

        Raises:
            ValueError: One cannot be. Nothing has changed then.
        """

    @abstractmethod
    def agree(self, error: Exception | None) -> None:
        """Raise what this process has found, and where others could not find it themselves, on them too. Collective."""

    @abstractmethod
    def install(self, old: nn.Module, plain: nn.Module, new: nn.Module) -> None:
        """Take a new layer's parameters over in place of an old one's. Collective.

        Args:
            old: The layer as the engine holds it, one of those admitted.
            plain: :meth:`whole` of it, from which ``new`` was made.
            new: The new layer, with whole parameters. Those it has taken over from ``plain`` (bias; W as an adapter's
                base) become the old layer's own Parameter objects, so that their optimizer state needs no code.
        """

    @abstractmethod
    def settle(self) -> None:
        """Finish what :meth:`install` has begun, once all layers are in."""

    @abstractmethod
    def around_switch(self, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """A block in which the model changes form; after it the engine trains the new parameters.

        Args:
            options: The keyword arguments that the engine's wrapper was made with.
        """
