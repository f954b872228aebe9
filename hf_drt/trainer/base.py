"""What type checkers take a mixin over ``transformers.Trainer`` to be: a Trainer. At run time it is no such thing, so
that it goes with every subclass of Trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    class TrainerBase(Trainer):
        """A Trainer as it is once its constructor is through."""

        model: nn.Module
        model_wrapped: nn.Module
        optimizer: Any  # None until it is made; accelerate's stand-ins come with engines that are refused
        hub_model_id: str  # with push_to_hub, without which nothing is published

else:
    TrainerBase = object

__all__ = ["TrainerBase"]
