"""One update step of a model on tensors without data: its FLOPs and its memory.

The model's own forward and backward pass run on fake tensors that say they are on the CPU, so that the kernels are
those of a real run (fused attention where there is one), whatever the architecture.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from hf_drt.forms import StackWeight, layer_of, place_of, stack_count, weight_shape
from hf_drt.simulate.batch import BatchSpec
from hf_drt.simulate.counter import StepCounter
from hf_drt.simulate.fakes import without_data
from hf_drt.simulate.optimizer import optimizer_bytes


class SimulationError(ValueError):
    """The cost of a model does not follow from its shapes."""


@dataclass(frozen=True)
class StepCost:
    """One update step. Memory is in bytes, and is what tensors take: a process needs some hundred MiB beside.

    Attributes:
        flops: Floating-point operations of the forward and backward passes, two per multiply-add: products of matrices,
            attention and convolutions of the whole model. Element-wise operations and optimizers are not counted.
        parameters: Of the model, those without gradients included; ``trainable`` those with.
        weights: Parameters and buffers.
        gradients, optimizer: Gradients of all trainable parameters, and the optimizer's state.
        activations: What the forward pass keeps for the backward pass.
        peak: The most that is alive at one time. Less than the sum of the parts: gradients come as activations go.
        rows: Vectors that each watched layer multiplies in the forward passes, by name; a convolution's output
            positions.
    """

    flops: int
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    rows: dict[str, int]

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and the optimizer's state."""
        return self.weights + self.gradients + self.optimizer


def simulate_step(
    model: nn.Module,
    batch: BatchSpec,
    *,
    optimizer: str = "adamw_torch",
    accumulation: int = 1,
    pieces: int = 1,
    autocast: torch.dtype | None = None,
    watch: Sequence[str] = (),
    matrices: Sequence[str] = (),
) -> StepCost:
    """Count one update step.

    Args:
        model: On the meta device, of transformers, in any mix of forms; it stays as it is.
        batch: Of one forward pass, before it is divided.
        optimizer: A value of ``optim`` in TrainingArguments, of :func:`hf_drt.optim.optim_names`.
        accumulation: Batches per update step.
        pieces: Forward and backward passes per batch, each of as many samples; the memory is that of the largest, and
            the FLOPs are those of all samples.
        autocast: Mixed precision.
        watch: Names of linear layers whose :attr:`StepCost.rows` are asked for.
        matrices: Names of the layers whose weights the matrix optimizer trains in place of ``optimizer``.

    Raises:
        SimulationError: The forward pass depends on values, or a kernel has no rule for shapes.
        ValueError: As :func:`.optimizer_bytes`.
    """
    state, scratch = optimizer_bytes(optimizer, model.parameters(), [layer_of(model, name) for name in matrices])
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(without_data(model))
        stack.enter_context(_GroupedByShape())
        rows = stack.enter_context(_watched(model, watch))
        counter = _with_parameters(model)
        weights = counter.now
        piece = batch.piece(pieces)
        inputs = piece.empty()
        for tensor in inputs.values():
            counter.add(tensor)
        # A third micro-batch takes the memory of the second.
        passes = min(accumulation * min(pieces, batch.rows), 2)
        done = passes * piece.rows
        try:
            activations = _passes(model, inputs, counter, passes, autocast)
        except Exception as error:  # whatever a model raises on tensors without data
            raise SimulationError(_explained(model, error)) from error
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        return StepCost(
            flops=counter.flops * accumulation * batch.rows // done,
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=weights,
            gradients=gradients,
            optimizer=state,
            activations=activations,
            peak=state + max(counter.peak, weights + gradients + scratch),
            rows={name: count * accumulation * batch.rows // done for name, count in rows.items()},
        )


def _passes(
    model: nn.Module, inputs: dict[str, Tensor], counter: StepCounter, times: int, autocast: torch.dtype | None
) -> int:
    """Forward and backward passes; the bytes that the first forward pass has left."""
    model.train()
    before, left = counter.now, 0
    for index in range(times):
        with counter, torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = model(**inputs)
            loss = output.loss if hasattr(output, "loss") else output[0]
        del output  # a Trainer keeps the loss alone
        left = left if index else counter.now - before
        with counter:
            loss.backward()
        del loss
    return left


def _with_parameters(model: nn.Module) -> StepCounter:
    counter = StepCounter()
    for tensor in (*model.parameters(), *model.buffers()):
        counter.add(tensor)
    return counter


@contextlib.contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    rows = dict.fromkeys(names, 0)

    def count(name: str, vectors: Callable[..., int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch._C._current_graph_task_id() >= 0:  # no second count as checkpointing repeats the forward pass
                rows[name] += vectors(args, kwargs, output)

        return hook

    handles = []
    for name in names:
        layer = layer_of(model, name)
        if stack_count(layer) is None:
            place, vectors = layer, _positions(weight_shape(layer)[0])
        else:
            place, vectors = place_of(model, name)[0], _rows_of_experts
        handles.append(place.register_forward_hook(count(name, vectors), with_kwargs=True))
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # logs what is raised anyway
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield rows
    finally:
        logger.setLevel(level)
        for handle in handles:
            handle.remove()


def _positions(outputs: int) -> Callable[..., int]:
    """Of a layer: how many vectors of so many outputs it has given."""
    return lambda args, kwargs, output: output.numel() // outputs


def _rows_of_experts(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """One for each expert that a token is sent to; experts without such indices multiply all that they are given."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    index = next((value for value in given if not value.is_floating_point()), None)
    return given[0].numel() // given[0].shape[-1] if index is None else index.numel()


class _GroupedByShape(TorchFunctionMode):
    """Grouped products, whose kernel has a rule for shapes in bfloat16 only, as one product: as many multiply-adds and
    as much memory, since the groups share out the same rows."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch._grouped_mm:
            return func(*args, **(kwargs or {}))
        x, weights = args[:2]
        if isinstance(weights, StackWeight):  # whose own products come back here
            with self:
                return StackWeight.__torch_function__(func, types, args, kwargs)
        return x @ weights[0]


def _explained(model: nn.Module, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"the cost of {type(model).__name__} does not follow from its shapes ({reason}). Experts that are multiplied "
        "one by one depend on values: set experts_implementation to grouped_mm in the configuration."
    )
