"""State of an optimizer, in bytes, from the shapes of what it trains."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Rule:
    """``state`` gives the bytes of one parameter's state, ``scratch`` those that exist while it is updated."""

    state: Callable[[torch.Tensor], int]
    scratch: Callable[[torch.Tensor], int]


def _bytes(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()


def _adafactor(p: torch.Tensor) -> int:
    """Row and column means of the squared gradient in float32; of a vector the squares themselves."""
    factors = p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
    return 4 * factors + 4  # and the root mean square of the parameter


_STEP_COUNT = 4  # torch keeps it as a float32 tensor per parameter

OPTIMIZERS: dict[str, _Rule] = {
    "adamw_torch": _Rule(lambda p: 2 * _bytes(p) + _STEP_COUNT, _bytes),
    "adamw_torch_fused": _Rule(lambda p: 2 * _bytes(p) + _STEP_COUNT, lambda p: 0),
    "sgd": _Rule(lambda p: 0, lambda p: 0),
    "adafactor": _Rule(_adafactor, lambda p: 2 * 4 * p.numel()),
    "rmsprop": _Rule(lambda p: _bytes(p) + _STEP_COUNT, _bytes),
}
"""Names as in ``optim`` of the training arguments; ``sgd`` without momentum, as the Trainer makes it."""


def optimizer_bytes(optimizer: str, parameters: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Bytes of the optimizer's state of all trainable parameters, and of the largest temporary of its step.

    Raises:
        ValueError: The optimizer is none of :data:`OPTIMIZERS`.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"'{optimizer}' is no optimizer of known state; allowed are {', '.join(OPTIMIZERS)}.")
    rule, trainable = OPTIMIZERS[optimizer], [p for p in parameters if p.requires_grad]
    return sum(map(rule.state, trainable)), max(map(rule.scratch, trainable), default=0)
