"""Where DeepSpeed's ZeRO optimizers keep the numbers of a parameter: the private parts that the engine relies on.

ZeRO-1 and 2 lay the parameters of a group one after the other in a flat tensor and cut it into equal parts, so that a
parameter may lie on several processes. ZeRO-3 cuts every parameter into equal parts. In both, each process's optimizer
trains flat tensors of float32, one or a few for each group, and its state is of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

# Attributes of a ZeRO optimizer, by stage, that the code below reads; tests/distributed/test_zero.py fails first if
# DeepSpeed moves one.
SEAMS = {
    1: ("optimizer", "bit16_groups", "single_partition_of_fp32_groups", "partition_gradients", "loss_scaler"),
    2: ("optimizer", "bit16_groups", "single_partition_of_fp32_groups", "partition_gradients", "loss_scaler"),
    3: ("optimizer", "fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "get_param_id", "loss_scaler"),
}


class Place(NamedTuple):
    """Where this process holds its part of a parameter.

    Attributes:
        flat: The flat tensor that its optimizer trains.
        offset: In ``flat``.
        start: In the parameter.
        count: Elements.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The part in a tensor that is laid out as :attr:`flat` is."""
        return flat.narrow(0, self.offset, self.count)

    def entry(self, value: Any) -> Tensor | None:
        """The part of an entry of the flat tensor's state; None of one that is of the tensor as a whole, as a count of
        steps is."""
        return self.of(value) if isinstance(value, Tensor) and value.shape == self.flat.shape else None


def is_partitioned(parameter: Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3, whose shape is empty while it is not gathered."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape of a parameter, partitioned or not."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)  # type: ignore[reportAttributeAccessIssue]


def stage_of(zero: Any) -> int:
    """1, 2 or 3: of a ZeRO optimizer."""
    return 3 if hasattr(zero, "fp16_groups") else 2 if zero.partition_gradients else 1


def places(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """Every trained parameter's place, in the optimizer's order, which is the same on all processes."""
    return _in_parts(zero) if stage_of(zero) == 3 else _in_one(zero)


def _in_one(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapped = parameter._hp_mapping
            if mapped is None:  # it lies on other processes as a whole
                yield parameter, Place(flat, 0, 0, 0)
            else:
                held, own = mapped.hp_fragment_address, mapped.lp_fragment_address
                yield parameter, Place(flat, held.start, own.start, own.numel)


def _in_parts(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in parameters:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, count = span(parameter)
            yield parameter, Place(flat, offset, start, max(0, min(count, parameter.ds_numel - start)))


def span(parameter: Any) -> tuple[int, int]:
    """Start and length of this process's part of a partitioned parameter, padding included."""
    count = parameter.ds_tensor.ds_numel
    return parameter.ds_zero_partition_rank * count, count


def write_partition(parameter: Any, whole: Tensor) -> None:
    """Set this process's part of a partitioned parameter from the whole."""
    start, count = span(parameter)
    part = whole.detach().reshape(-1)[start : start + count]
    parameter.ds_tensor[: len(part)].copy_(part)


def placeholder(parameter: Any) -> None:
    """Give a partitioned parameter its shape back, without memory: what asks for shapes need not know of ZeRO."""
    parameter.data = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.ds_shape)


def emptied(parameter: Any) -> None:
    """As ZeRO-3 expects a parameter that is not gathered."""
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


@contextlib.contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """In the block partitioned parameters have their shapes (:func:`placeholder`); nothing may compute with them."""
    for parameter in filter(_is_empty, model.parameters()):
        placeholder(parameter)
    try:
        yield
    finally:
        for parameter in filter(_is_placeholder, model.parameters()):
            emptied(parameter)


def _is_empty(parameter: Any) -> bool:
    return is_partitioned(parameter) and parameter.numel() < parameter.ds_numel


def _is_placeholder(parameter: Any) -> bool:
    return is_partitioned(parameter) and parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE


# What ZeRO-3 sets on modules when it is made, and leaves there. The two functions gather the weights of the module that
# they were made for, by the coordinator of the engine that made them, and another engine takes them over as they are.
_ON_MODULES = (
    "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining", "ds_id",
    "ds_recompute_parameters", "ds_inflight_param_registry", "ds_model_granularity", "_original_parameters",
)  # fmt: skip


def forget_module(module: nn.Module) -> None:
    """Take from a module what its ZeRO optimizer has left on it."""
    for name in _ON_MODULES:
        vars(module).pop(name, None)
    module._parameters = dict(module._parameters)


def forget(parameter: Any) -> None:
    """Take from a parameter what its ZeRO optimizer has left on it, by which it would be kept alive; a small one that
    ZeRO-3 keeps whole on every process is partitioned as all others."""
    if is_partitioned(parameter) and parameter.ds_status is ZeroParamStatus.AVAILABLE:
        parameter.partition()
    for name in ("_z3_optimizer", "_zero_optimizer", "_hp_mapping", "grad_accum"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    parameter.grad = None
