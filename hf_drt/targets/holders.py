"""Who else holds a layer or its weight: what is in no ``_modules`` and ``_parameters`` goes on using a layer that has
been replaced."""

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_drt.engines import is_wrapper

_REGISTERED = ("_modules", "_parameters", "_buffers")
_ATOMS = {bool, int, float, str, bytes, type(None)}
_COLLECTIONS = (list, tuple, set, frozenset, deque)
# Objects of these packages that hold parameters follow a change of form, as optimizers do, or belong to the engine.
_KNOWN = ("torch.", "transformers.", "accelerate.", "hf_drt.")


def held_elsewhere(model: nn.Module) -> set[int]:
    """Modules and parameters, by id, that something else in the model holds.

    A plain attribute such as ``self.layers = [conv, norm]``, however deep in lists, dicts and objects; a partial or a
    bound method; what a hook or a forward of an instance closes over; a module that is not part of the model. What a
    module's own attributes hold of itself is no other holder (:func:`hf_drt.forms.own_behaviour` looks at those).
    """
    tree = {id(module) for module in model.modules()}
    found: set[int] = set()
    holders: dict[int, list[Any]] = {}
    for module in model.modules():
        if is_wrapper(module):  # may list all parameters, and gets the new ones at a switch
            continue
        own = {id(module), *map(id, module._parameters.values())}
        found |= _reached([v for key, v in vars(module).items() if key not in _REGISTERED], tree, holders) - own
    return found


def _reached(waiting: list[Any], tree: set[int], holders: dict[int, list[Any]]) -> set[int]:
    """Modules and parameters, by id, that some values lead to; not through modules of the tree.

    Args:
        holders: What earlier calls have met, by id, with the number of calls; brought up to date. The objects too: an
            id is unique only as long as its object lives. What two modules hold, such as one list of all layers, has
            been told by the second, to whom nothing in it is its own, and is not gone through by each.
    """
    found: set[int] = set()
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        key = id(value)
        if type(value) in _ATOMS or key in seen:
            continue
        seen.add(key)
        met = holders.setdefault(key, [value, 0])
        met[1] += 1
        if isinstance(value, (nn.Module, nn.Parameter)):
            found.add(key)
        if key not in tree and met[1] <= 2:
            waiting.extend(_inside(value))
    return found


def _inside(value: Any) -> Iterable[Any]:
    match value:
        case nn.Module():
            return [*vars(value).values()]
        case dict():
            return value.values()
        case functools.partial():
            return [value.func, *value.args, *value.keywords.values()]
        case types.MethodType():
            return [value.__self__, value.__func__]
        case types.FunctionType():
            return [*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, _COLLECTIONS):
        return value
    plain = hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, torch.Tensor))
    return vars(value).values() if plain and not f"{type(value).__module__}.".startswith(_KNOWN) else ()


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
