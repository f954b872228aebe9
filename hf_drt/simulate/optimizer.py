"""What an optimizer takes, in bytes: its own step is run on tensors without data, once for each shape."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_drt.forms import form_of, layout_of, trainable_weights
from hf_drt.optim import MATRIX, STACKED, LayerUpdate, maker, update_layers
from hf_drt.simulate.counter import StepCounter
from hf_drt.simulate.fakes import without_data

_GROUP = {"lr": 1.0, "weight_decay": 0.0, MATRIX: 0.5}


def optimizer_bytes(
    optimizer: str, parameters: Iterable[torch.Tensor], matrices: Iterable[nn.Module] = ()
) -> tuple[int, int]:
    """Bytes of the optimizer's state of all trainable parameters, and of the largest temporary of its step.

    Parameters are updated one after the other, as torch does on a CPU, and the matrix optimizer's layers as many
    together as :func:`hf_drt.optim.update_layers` takes. Of a step that is compiled into few kernels the temporaries
    are not known, and count as none.

    Args:
        optimizer: A value of ``optim`` in TrainingArguments, of :func:`hf_drt.optim.optim_names`.
        parameters: Of the model, with data or without.
        matrices: Layers, in any form, whose weights the matrix optimizer trains in place of the other.

    Raises:
        ValueError: The optimizer is not one that may follow a change of form, or its package is not installed.
    """
    rule, make = maker(optimizer)
    state = scratch = 0
    layers = list(matrices)
    apart = {id(weight) for layer in layers for weight in trainable_weights(layer)}
    counts = Counter((tuple(p.shape), p.dtype) for p in parameters if p.requires_grad and id(p) not in apart)
    with torch.compiler.set_stance("force_eager"):
        _prime(make)
        for (shape, dtype), count in counts.items():
            with FakeTensorMode(), _ScalarsAnswered():
                weight, gradient = _weight(shape, dtype)
                own = make([weight])
                kept, temporary = _step_bytes(own, own.step, weight, gradient)
            state, scratch = state + count * kept, max(scratch, temporary)
    scratch = 0 if rule.compiled else scratch
    for alike in _alike(layers):
        together = alike[: max(1, STACKED // sum(w.numel() for w in trainable_weights(alike[0])))]
        with FakeTensorMode():
            kept, temporary = _matrix_bytes(together)
        state, scratch = state + kept * len(alike) // len(together), max(scratch, temporary)
    return state, scratch


def _alike(layers: Iterable[nn.Module]) -> Iterable[list[nn.Module]]:
    """Layers whose updates take the same memory, together."""
    found: dict[tuple, list[nn.Module]] = defaultdict(list)
    for layer in layers:
        weights = trainable_weights(layer)
        key = tuple((tuple(w.shape), w.dtype, w.requires_grad) for w in weights)
        if any(w.requires_grad for w in weights):
            found[form_of(layer), layout_of(layer), key].append(layer)
    return found.values()


def _matrix_bytes(layers: list[nn.Module]) -> tuple[int, int]:
    """As :func:`_step_bytes`, of the matrix optimizer's update of layers that are alike, together if it can."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(without_data(layer))
        updates = [_update(layer) for layer in layers]
        weights = [weight for update in updates for weight in update.weights]
        gradients = [g for update in updates for g in update.gradients if g is not None]
        optimizer = torch.optim.SGD(weights, lr=1.0)  # holds the state, and takes no step
        return _step_bytes(optimizer, lambda: update_layers(optimizer, updates), *weights, *gradients)


def _update(layer: nn.Module) -> LayerUpdate:
    weights = trainable_weights(layer)
    gradients = [torch.empty_like(weight) if weight.requires_grad else None for weight in weights]
    return LayerUpdate(layer, weights, gradients, _GROUP)


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


def _step_bytes(optimizer: torch.optim.Optimizer, step: Callable[[], object], *given: torch.Tensor) -> tuple[int, int]:
    """What is alive after a step and was not before, and the most that a second one needs beyond that."""
    counter = StepCounter()
    for tensor in given:
        counter.add(tensor)
    before = counter.now
    _count_state(optimizer, counter)
    with counter:
        step()
    kept = counter.now - before
    counter.peak = counter.now
    with counter:
        step()
    return kept, counter.peak - before - kept


def _count_state(optimizer: torch.optim.Optimizer, counter: StepCounter) -> None:
    """Count what the optimizer has made before its first step."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                counter.add(value)
