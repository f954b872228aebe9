"""A checkpoint that another number of processes has written, or another stage of ZeRO, is loaded into an engine.

DeepSpeed reads its files where each process finds its own flat tensors in one of them, and nowhere else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from hf_drt.engines.zero.layout import is_partitioned, places, shape_of, stage_of
from hf_drt.engines.zero.written import Written, has_layout


def reads_any_layout(engine: DeepSpeedEngine) -> None:
    """From now on ``engine.load_checkpoint(folder)`` reads what other numbers of processes have written, and
    other stages."""
    known: Any = engine
    own = known.load_checkpoint

    def load_checkpoint(folder: str, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any]]:
        if has_layout(Path(folder), dist.get_world_size(), stage_of(known.optimizer)):
            return own(folder, *args, **kwargs)
        _load(known, Written(Path(folder)))
        return folder, {}

    known.load_checkpoint = load_checkpoint


@torch.no_grad()
def _load(engine: Any, written: Written) -> None:
    """Weights, float32 values, the optimizer's state, the scale of the loss, and the engine's counts. Collective."""
    zero, names = engine.optimizer, {p: name for name, p in engine.module.named_parameters()}
    for parameter, name in names.items():
        _set(parameter, written, name)
    for name, buffer in _persistent(engine.module).items():
        buffer.copy_(written.value(name).view(buffer.shape))
    for parameter, place in places(zero):
        part = slice(place.start, place.start + place.count)
        place.of(place.flat).copy_(written.master(names[parameter])[part])
        _put_state(zero.optimizer.state[place.flat], written.state(names[parameter]), place, part)
    zero.loss_scaler = written.loss_scaler or zero.loss_scaler
    vars(engine).update(written.counts)


def _put_state(held: dict[str, Any], state: Mapping[str, Any], place: Any, part: slice) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            if key not in held:
                held[key] = torch.zeros_like(place.flat, dtype=value.dtype)
            place.of(held[key]).copy_(value[part])
        else:
            held[key] = value


def _set(parameter: nn.Parameter, written: Written, name: str) -> None:
    """A partitioned parameter is gathered, set by the first process, and shared out again."""
    if not is_partitioned(parameter):
        parameter.copy_(_shaped(written.value(name), parameter))
        return
    with GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.copy_(_shaped(written.value(name), parameter))


def _shaped(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.flatten()[: parameter.numel()].view(shape_of(parameter))


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are saved."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
