"""Step hooks that act once in a step.

Where a class's ``step`` calls ``super().step()``, torch runs the hooks of both, if it has wrapped both: that it does
for a class as the first object of just this class is made, anywhere in the process. What stands around a step has to
stand around the outer one. A count of steps that are entered and left would be wrong after one that raises, so the
stack is asked.
"""

import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import torch

Hook = Callable[[Any, torch.optim.Optimizer, tuple, dict], None]


def outermost(hook: Hook) -> Hook:
    """A method that is a step hook, and does nothing in a step within a step of the same optimizer."""

    @wraps(hook)
    def run(self: Any, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not _is_within(sys._getframe(1), optimizer):
            hook(self, optimizer, args, kwargs)

    return run


def _is_within(step: FrameType, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the frame of torch's wrapper that runs the hook is called from another one of the same optimizer."""
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
