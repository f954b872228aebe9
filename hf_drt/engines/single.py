"""Every process holds the whole model, as a single one does."""

import contextlib
from typing import Any

from torch import Tensor, nn

from hf_drt.engines.engine import Engine


class Single(Engine):
    """Parameters are plain and whole, so that there is nothing to do; the engine of any model without another."""

    help = "a single process, or any model without another engine"
    sharded = False

    @classmethod
    def manages(cls, model: nn.Module) -> bool:
        return True

    @classmethod
    def inside(cls, module: nn.Module) -> nn.Module | None:
        return None

    @classmethod
    def begun(cls, model: nn.Module) -> nn.Module:
        return model

    def held(self, tensor: Tensor) -> Tensor:
        return tensor

    def full(self, value: Any) -> Any:
        return value

    def whole(self, layer: nn.Module) -> nn.Module:
        return layer

    def like(self, value: Any, weight: Tensor) -> Any:
        return value

    def admit(self, layers: list[nn.Module]) -> None:
        """Any layer can be replaced."""

    def agree(self, error: Exception | None) -> None:
        """Several processes hold the same values, and find the same."""
        if error is not None:
            raise error

    def install(self, old: nn.Module, plain: nn.Module, new: nn.Module) -> None:
        """Nobody but the model holds the parameters."""

    def settle(self) -> None:
        """Nothing is left to do."""

    def around_switch(self, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
