"""What an optimizer takes, in bytes: its own step is run on tensors without data, once for each shape."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_drt.optim import maker
from hf_drt.simulate.counter import StepCounter


def optimizer_bytes(optimizer: str, parameters: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Bytes of the optimizer's state of all trainable parameters, and of the largest temporary of its step.

    Parameters are updated one after the other, as torch does on a CPU. Of a step that is compiled into few kernels the
    temporaries are not known, and count as none.

    Args:
        optimizer: A value of ``optim`` in TrainingArguments, of :func:`hf_drt.optim.optim_names`.
        parameters: Of the model, with data or without.

    Raises:
        ValueError: The optimizer is not one that may follow a change of form, or its package is not installed.
    """
    rule, make = maker(optimizer)
    state = scratch = 0
    counts = Counter((tuple(p.shape), p.dtype) for p in parameters if p.requires_grad)
    with torch.compiler.set_stance("force_eager"):
        _prime(make)
        for (shape, dtype), count in counts.items():
            with FakeTensorMode(), _ScalarsAnswered():
                weight, gradient = _weight(shape, dtype)
                kept, temporary = _step_bytes(make([weight]), weight, gradient)
            state, scratch = state + count * kept, max(scratch, temporary)
    return state, 0 if rule.compiled else scratch


def _weight(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Parameter, torch.Tensor]:
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    weight.grad = gradient = torch.zeros(shape, dtype=dtype)
    return weight, gradient


def _prime(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    """A step with data, of a matrix large enough to be kept in few bits: what a library computes once for the process,
    as torchao its codes, has to be computed from numbers."""
    weight, _ = _weight((64, 64), torch.float32)
    make([weight]).step()


class _ScalarsAnswered(TorchDispatchMode):
    """Where a step asks for a number that tensors without data do not have, as for a clipped rate, it gets one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1.0 if args[0].is_floating_point() else 1


def _step_bytes(optimizer: torch.optim.Optimizer, *given: torch.Tensor) -> tuple[int, int]:
    """What is alive after a step and was not before, and the most that a second one needs beyond that."""
    counter = StepCounter()
    for tensor in given:
        counter.add(tensor)
    before = counter.now
    _count_state(optimizer, counter)
    with counter:
        optimizer.step()
    kept = counter.now - before
    counter.peak = counter.now
    with counter:
        optimizer.step()
    return kept, counter.peak - before - kept


def _count_state(optimizer: torch.optim.Optimizer, counter: StepCounter) -> None:
    """Count what the optimizer has made before its first step."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                counter.add(value)
