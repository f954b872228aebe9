"""What an optimizer takes, in bytes: its own step is run on tensors without data, once for each shape."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_drt.optim import maker
from hf_drt.simulate.counter import StepCounter


def optimizer_bytes(optimizer: str, parameters: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Bytes of the optimizer's state of all trainable parameters, and of the largest temporary of its step.

    Parameters are updated one after the other, as torch does on a CPU.

    Args:
        optimizer: A value of ``optim`` in TrainingArguments, of :func:`hf_drt.optim.optim_names`.
        parameters: Of the model, with data or without.

    Raises:
        ValueError: The optimizer is not one that may follow a change of form.
    """
    _, make = maker(optimizer)
    state = scratch = 0
    counts = Counter((tuple(p.shape), p.dtype) for p in parameters if p.requires_grad)
    with FakeTensorMode():
        for (shape, dtype), count in counts.items():
            weight = nn.Parameter(torch.empty(shape, dtype=dtype))
            weight.grad = gradient = torch.empty(shape, dtype=dtype)
            kept, temporary = _step_bytes(make([weight]), weight, gradient)
            state, scratch = state + count * kept, max(scratch, temporary)
    return state, scratch


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
