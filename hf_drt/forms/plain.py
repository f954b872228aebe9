"""Does a layer do what its class does, and nothing more? Read off the object and its class; nothing is run.

Only of a plain layer, ``x W^T + b`` or a convolution, do a low-rank form and a dense one made from it compute the same.
What else an instance does (a forward pass or a hook of its own) belongs to that object, and cannot follow it.
"""

import inspect
from collections.abc import Iterable
from types import MethodType

from torch import Tensor, nn

from hf_drt.forms.kept import BASE, SCALE
from hf_drt.forms.layout import CONV1D, dense_layout

# By qualified name: nothing here imports transformers. The forward pass of each is the plain one.
_PLAIN = {
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    CONV1D,
    "transformers.models.falcon.modeling_falcon.FalconLinear",  # x @ W.T + b, written out
}
_OURS = "hf_drt.forms."
# Engines add what they make of parameters, and the hooks by which they keep a layer's state dict; optimizers add those
# by which they update a weight in the backward pass: see accept().
_TENSORS = {"torch.nn.parameter.Parameter", "torch._subclasses.fake_tensor.FakeTensor"}
_STATE_HOOKS: set[str] = set()
_GRADIENT_HOOKS: set[str] = set()
_HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward pre",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward pre",
    "_state_dict_hooks": "state dict",
    "_state_dict_pre_hooks": "state dict pre",
    "_load_state_dict_pre_hooks": "load state dict pre",
    "_load_state_dict_post_hooks": "load state dict post",
}
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# What a class may define for itself without its layers computing, loading or saving anything else.
_HARMLESS = {
    "__init__", "__new__", "reset_parameters", "extra_repr", "__repr__", "__str__", "_get_name", "__dir__", "__hash__",
    "__eq__", "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__",
    "__annotate_func__", "__init_subclass__", "__subclasshook__", "__class_getitem__",
}  # fmt: skip


def accept(tensors: Iterable[str] = (), hooks: Iterable[str] = (), gradient_hooks: Iterable[str] = ()) -> None:
    """What an engine or an optimizer does to every layer that it trains is no behaviour of the layer's own.

    Args:
        tensors: Qualified names of the classes of its parameters.
        hooks: Beginnings of the names of modules whose state-dict hooks the engine sets anew on a new layer.
        gradient_hooks: The same of hooks on the gradients of weights, which the optimizer sets anew.
    """
    _TENSORS.update(tensors)
    _STATE_HOOKS.update(hooks)
    _GRADIENT_HOOKS.update(gradient_hooks)


def own_behaviour(module: nn.Module) -> str | None:
    """Why a layer does more than the plain product with its weight, or None.

    Of a layer in low-rank form, why it does more than that form.
    """
    if _plain_class(module) is None:
        return "neither a linear layer nor a convolution"
    checks = (odd_tensors, _more_members, _hooked, _own_attribute, _override)
    return next((reason for check in checks if (reason := check(module))), None)


def odd_tensors(module: nn.Module) -> str | None:
    """Why a layer's parameters are not those of its form, or None: then it cannot change form at all."""
    low_rank = getattr(module, "tensors", None) if _is_ours(type(module)) else None
    names, held = set(low_rank or ("weight",)), module._parameters
    weights = {name: weight for name in names if (weight := held.get(name)) is not None}
    if len(weights) < len(names) or hasattr(module, "parametrizations"):
        return "parametrized"
    if hidden := sorted(held.keys() & vars(module).keys()):
        return f"own {hidden[0]} on the instance"
    codes = {BASE} if SCALE in names else set()  # of a base in int8
    plain = all(
        _qualified(type(weight)) in _TENSORS and (weight.is_floating_point() or name in codes)
        for name, weight in weights.items()
    )
    if not plain or (low_rank is None and weights["weight"].ndim != len(dense_layout(module).shape(0, 0))):
        return "quantized or not a plain matrix"
    return "holds more than weight and bias" if set(held) - names - {"bias"} else None


def strip(copied: nn.Module, original: nn.Module) -> None:
    """Take from a shallow copy of a layer what is the other object's own behaviour; other attributes stay.

    Hooks would be shared with the original, and a function that is bound to it computes with its weights.
    """
    for name, value in vars(nn.Module()).items():
        if "hook" in name:
            copied.__dict__[name] = value
    for name in [name for name in vars(copied) if _shadows(original, name)]:
        del copied.__dict__[name]
    for name, value in vars(copied).items():
        if isinstance(value, MethodType) and value.__self__ is original:
            copied.__dict__[name] = MethodType(value.__func__, copied)


def _plain_class(module: nn.Module) -> type | None:
    """The class with a plain forward pass that the layer's class is, or is derived from."""
    return next((cls for cls in type(module).__mro__ if _qualified(cls) in _PLAIN or _is_ours(cls)), None)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(_OURS)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _more_members(module: nn.Module) -> str | None:
    members = (*module._buffers.values(), *module._modules.values())
    return "holds more than weight and bias" if any(member is not None for member in members) else None


def _hooked(module: nn.Module) -> str | None:
    for attribute, kind in _HOOKS.items():
        hooks = (getattr(module, attribute, None) or {}).values()
        if any("state" not in kind or not _is_of(hook, _STATE_HOOKS) for hook in hooks):
            return f"hooked ({kind})"
    weights = (weight for name, weight in module._parameters.items() if name != "bias" and weight is not None)
    return "hooked weight" if any(map(_has_hooks, weights)) else None


def _is_of(hook: object, modules: set[str]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(tuple(modules))


def _has_hooks(weight: Tensor) -> bool:
    """Hooks on gradients; a parameter that stays the same object, as the bias does, keeps its own."""
    hooks = (hook for kind in _TENSOR_HOOKS for hook in (getattr(weight, kind, None) or {}).values())
    return not all(_is_of(hook, _GRADIENT_HOOKS) for hook in hooks)


def _own_attribute(module: nn.Module) -> str | None:
    for name, value in vars(module).items():
        own = isinstance(value, MethodType) and value.__self__ is module
        if _shadows(module, name) and not (own and value.__func__ is inspect.getattr_static(type(module), name, None)):
            return f"own {name} on the instance"
    return None


def _shadows(module: nn.Module, name: str) -> bool:
    """Whether an attribute of the instance stands in front of a method or property of its class."""
    if not hasattr(type(module), name):  # as nearly always, and a static look-up is slow
        return False
    of_class = inspect.getattr_static(type(module), name, None)
    in_place_of_none = callable(vars(module)[name]) and hasattr(nn.Module, name)  # such as _compiled_call_impl
    return callable(of_class) or hasattr(of_class, "__get__") or in_place_of_none


def _override(module: nn.Module) -> str | None:
    """The methods and properties of the plain class that the layer's class has otherwise."""
    cls, plain = type(module), _plain_class(module) or nn.Module
    more = [base for base in cls.__mro__ if base not in plain.__mro__]
    if not more:
        return None
    defined = {name for base in more for name in vars(base)} & {*dir(plain), "weight", "bias"}
    names = sorted(name for name in defined - _HARMLESS if _differs(cls, plain, name))
    return f"its class overrides {', '.join(names)}" if names else None


def _differs(cls: type, plain: type, name: str) -> bool:
    value = inspect.getattr_static(cls, name)
    behaves = callable(value) or hasattr(value, "__get__")
    return behaves and value is not inspect.getattr_static(plain, name, None)
