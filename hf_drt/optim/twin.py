"""A twin of an optimizer: its class, options and attributes, over other parameters and without its state.

It is made without the constructor, whose arguments nobody knows any more. Attributes are copied deeply, with the twin's
parameters in the place of the optimizer's wherever these are found; tensors that a model's memory may hang on are not
copied. Nothing of the optimizer is written to.
"""

import copy
import functools
import gc
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 2**16
"""Elements of the largest tensor that an optimizer may keep outside its state, as constants are."""

_ATOMS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float, bool, complex)


class TwinError(ValueError):
    """No twin can be made; the text says what stands against it, as in "the optimizer ...: it ..."."""


def twin(
    optimizer: torch.optim.Optimizer, params: list[list[nn.Parameter]], stand_in: Mapping[int, nn.Parameter]
) -> torch.optim.Optimizer:
    """An optimizer like this one, as it is before its first step.

    Args:
        params: The parameters of each of its groups.
        stand_in: By the identity of a parameter of the optimizer, what takes its place in the twin's attributes.

    Raises:
        TwinError: It holds a model or tensors of its own, steps in the backward pass, or has what cannot be copied.
    """
    _check_own(optimizer)
    _check_hooks(optimizer)
    made = object.__new__(type(optimizer))
    groups: list[dict[str, Any]] = [{"params": own} for own in params]
    memo: dict[int, Any] = {id(optimizer): made, id(optimizer.param_groups): groups, **stand_in}
    memo[id(optimizer.state)] = defaultdict(dict)
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        memo |= {id(group): new, id(group["params"]): new["params"]}
    try:
        for group, new in zip(optimizer.param_groups, groups, strict=True):
            new.update({key: copy.deepcopy(value, memo) for key, value in group.items() if key != "params"})
        for name, value in _attributes(optimizer):
            vars(made)[name] = copy.deepcopy(value, memo)
    except Exception as error:
        raise TwinError(
            f"it cannot be copied for a trial: its attributes or options raise {type(error).__name__}: {error}."
        ) from error
    return made


def _attributes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Its attributes, without hooks and methods that others have put on it, such as a scheduler's own ``step``."""
    for name, value in vars(optimizer).items():
        if isinstance(value, OrderedDict) and name.startswith("_optimizer_") and name.endswith("_hooks"):
            own = ((key, hook) for key, hook in value.items() if getattr(hook, "__self__", None) is optimizer)
            yield name, OrderedDict(own)
        elif not (callable(value) and callable(getattr(type(optimizer), name, None))):
            yield name, value


def _check_own(optimizer: torch.optim.Optimizer) -> None:
    params = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    shapes = {p.shape for p in params.values()}
    known = {id(optimizer), id(optimizer.state), id(optimizer.param_groups), *params}
    options = [(f"param_groups[...]['{key}']", v) for g in optimizer.param_groups for key, v in g.items()]
    for name, value in [*_attributes(optimizer), *options]:
        for held in _held(value, set(known)):
            if isinstance(held, nn.Module):
                raise TwinError(f"it holds a model ({type(held).__name__}) in {name}, of which a trial makes no copy.")
            if held.numel() > LARGEST or (held.numel() > 1 and held.shape in shapes):
                raise TwinError(
                    f"it keeps a tensor of shape {tuple(held.shape)} in {name}, outside its state, where neither a new "
                    "parameter nor a checkpoint finds it."
                )


def _held(value: Any, seen: set[int]) -> Iterator[Tensor | nn.Module]:
    """Tensors and models that a deep copy of the value would copy."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _ATOMS):
            continue
        seen.add(id(found))
        if isinstance(found, (Tensor, nn.Module)):
            yield found
        else:
            waiting += gc.get_referents(found)


def _check_hooks(optimizer: torch.optim.Optimizer) -> None:
    """New parameters have no hooks, and those of a parameter go unnoticed by a twin."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for name in ("_post_accumulate_grad_hooks", "_backward_hooks"):
            for hook in (getattr(p, name, None) or {}).values():
                if _reaches_optimizer(hook, depth=4):
                    raise TwinError(
                        f"it acts in the backward pass, by a hook on its parameters ({getattr(hook, '__name__', hook)}"
                        "), which new parameters would not have."
                    )


def _reaches_optimizer(value: Any, depth: int) -> bool:
    """Whether a hook is an optimizer's: bound to it, or a function with it in its closure or defaults."""
    if isinstance(value, torch.optim.Optimizer):
        return True
    parts: list[Any] = []
    if isinstance(value, types.MethodType):
        parts = [value.__self__]
    elif isinstance(value, types.FunctionType):
        parts = [value.__closure__, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, (types.CellType, tuple, list, dict, functools.partial)):
        parts = gc.get_referents(value)
    return depth > 0 and any(_reaches_optimizer(part, depth - 1) for part in parts)
