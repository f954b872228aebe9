"""Methods of a Trainer around which dynamic-rank training has to be the outermost, whoever overrides them.

Libraries write and load models in ways of their own: they override ``save_model``, ``_save`` or
``_load_from_checkpoint`` and call no base's. Where such a class comes before the mixin in the order of resolution, as
every library's trainer does under ``python -m hf_drt.run``, an override in the mixin would never be reached.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

AROUND = {
    "save_model": "_drt_around_saving",
    "_save": "_drt_around_save",
    "_load_from_checkpoint": "_drt_around_loading",
    "_load_best_model": "_drt_around_best_model",
    "evaluation_loop": "_drt_around_evaluation",
}
"""The method of :class:`hf_drt.DRTTrainerMixin` that is called in place of each; it gets the method, then what the
caller gave."""

_WRAPPED = "_drt_wrapped"


def wrap_overrides(cls: type) -> None:
    """Let the overrides of these methods that a class has, or gets from a class before the mixin, be called by way of
    the mixin's."""
    for name, around in AROUND.items():
        owner = next(base for base in cls.__mro__ if name in vars(base))
        method = vars(owner)[name]
        if around not in vars(owner) and not getattr(method, _WRAPPED, False):  # else the mixin's own, or wrapped
            setattr(cls, name, _within(method, around))


def _within(method: Callable[..., Any], around: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, around)(functools.partial(method, self), *args, **kwargs)

    setattr(called, _WRAPPED, True)
    return called


def call_with(method: Callable[..., Any], args: tuple, kwargs: dict, changed: dict[str, tuple[int, Any]]) -> Any:
    """Call a method as its caller did, but for some arguments.

    Args:
        changed: Position and new value by name; one that the method does not take is left out.
    """
    positional = list(args)
    parameters = inspect.signature(method).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, (position, value) in changed.items():
        if len(positional) > position:
            positional[position] = value
        elif name in parameters or takes_any:
            kwargs = kwargs | {name: value}
    return method(*positional, **kwargs)
