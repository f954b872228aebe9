"""Options of a command, made of the fields of DRTConfig: a new field is a new option by itself."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer import Option

from hf_drt.config import DRTConfig


def with_settings(
    left_out: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
    also: Mapping[str, str] | None = None,
    source: type = DRTConfig,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of the settings; it gets them as ``**settings``.

    Args:
        left_out: Fields without an option, each with the reason.
        defaults: Where the command's default is not the field's.
        also: What a field's help has to say for this command beside its own.
        source: The dataclass of the settings.

    Raises:
        ValueError: A name that is given here is not a field.
    """
    names = [f.name for f in fields(source)]
    for name in (*left_out, *(defaults or {}), *(also or {})):
        if name not in names:
            raise ValueError(f"{name} is not a field of {source.__name__}, whose fields are {', '.join(names)}.")

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        positional = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        keyword = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]

        def renew_options() -> None:
            made = [_parameter(f, source, defaults or {}, also or {}) for f in fields(source) if f.name not in left_out]
            signature = inspect.Signature([*positional, *made, *keyword])
            command.__signature__ = signature  # type: ignore[attr-defined]  # PEP 362

        command.renew_options = renew_options  # type: ignore[attr-defined]  # a registry may have a new member since
        renew_options()
        return command

    return decorate


def _parameter(f: Field, source: type, defaults: Mapping[str, Any], also: Mapping[str, str]) -> inspect.Parameter:
    kind = _option_type(get_type_hints(source)[f.name])
    text = " ".join([f.metadata["help"].replace("%%", "%"), also.get(f.name, "")]).strip()
    option = Option(help=text + (" May be repeated." if _repeats(kind) else ""))
    default = defaults.get(f.name, f.default)
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _option_type(hint: Any) -> Any:
    """A field's type as a command line carries it: a choice is checked, and a dict read, by DRTConfig itself."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_option_type(part) for part in get_args(hint) if get_origin(part) is not dict]
        return Union[tuple(parts)]  # noqa: UP007  (of a number of types that is not known)
    return hint


def _repeats(kind: Any) -> bool:
    return any(get_origin(part) is list for part in (kind, *get_args(kind)))
