"""A model that is called on the side: nothing that the call leaves behind may reach the training."""

import contextlib
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MAPPINGS = (dict, OrderedDict, defaultdict)
# FSDP2 exchanges parameters by itself, for whole ones and back, and makes its hooks in the first forward pass.
_OF_FSDP2 = ("_parameters", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_WITH_AN_INDEX = ("cuda", "xpu", "npu")  # accelerators with a generator for each device


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """After the block, the model and all random generators are as they were.

    Of every module: its attributes (the mode among them), what lists, dicts and sets in them hold, the values of
    buffers and other tensors, and its own generators; of the process: the generators of torch, of the devices that the
    model is on, of numpy and of Python. The values of parameters are not kept.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng([]))
        for kind, devices in _accelerators(model).items():
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        for value in _state(model):
            if (restore := _restorer(value)) is not None:
                stack.callback(restore)
        yield


def _accelerators(model: nn.Module) -> dict[str, list[int]]:
    """Indices of the model's devices, by their kind."""
    found: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type in _WITH_AN_INDEX:
            found.setdefault(tensor.device.type, set()).add(tensor.device.index)
    return {kind: sorted(indices) for kind, indices in found.items()}


def _state(model: nn.Module) -> Iterator[Any]:
    """Every module's attributes, their values, and the values in those that are mappings, such as the buffers."""
    for module in model.modules():
        yield vars(module)
        for value in (value for name, value in vars(module).items() if name not in _OF_FSDP2):
            yield value
            if type(value) in _MAPPINGS:
                yield from value.values()


def _restorer(value: Any) -> Callable[[], Any] | None:
    """Brings a mutable ``value`` back to what it is now, in place; None if it is of another kind."""
    if type(value) in _MAPPINGS:
        return _restorer_of(value, lambda: tuple(value.items()), lambda kept: (value.clear(), value.update(kept)))
    if type(value) in (list, deque):
        return _restorer_of(value, lambda: tuple(value), lambda kept: (value.clear(), value.extend(kept)))
    if type(value) is set:
        return _restorer_of(value, lambda: tuple(value), lambda kept: (value.clear(), value.update(kept)))
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _restorer_of_tensor(value)
    return _restorer_of_generator(value)


def _restorer_of(value: Any, read: Callable[[], tuple], write: Callable[[tuple], Any]) -> Callable[[], None]:
    """Of a collection; one that holds the same objects as before is left alone."""
    kept = read()

    def restore() -> None:
        if _identities(read()) != _identities(kept):
            write(kept)

    return restore


def _identities(items: tuple) -> list:
    return [tuple(map(id, item)) if isinstance(item, tuple) else id(item) for item in items]


def _restorer_of_tensor(tensor: Tensor) -> Callable[[], None]:
    kept = tensor.detach().clone()
    version = None if tensor.is_inference() else tensor._version

    def restore() -> None:
        if version is None or tensor._version != version:
            with torch.no_grad():
                tensor.copy_(kept)

    return restore


def _restorer_of_generator(value: Any) -> Callable[[], Any] | None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.RandomState):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", state)
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.setstate(state)
    return None
