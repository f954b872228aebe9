"""What a check is, and what it found: the registry of all, and the words of a result."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from hf_drt.registry import Registry

Value = float | int | str | bool | None


class Result(Enum):
    """How something came out."""

    HELD = "held"
    FAILED = "failed"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: It, in a few words.
        result: How it came out.
        seen: What was measured, and what is allowed where it did not hold; why it was not tried.
        values: The same as numbers, for a program.
    """

    what: str
    result: Result
    seen: str
    values: Mapping[str, Value] = field(default_factory=dict)


def found(what: str, holds: bool, seen: str, values: Mapping[str, Value] | None = None) -> Finding:
    """A finding of what was tried."""
    return Finding(what, Result.HELD if holds else Result.FAILED, seen, values or {})


def not_tried(what: str, why: str) -> Finding:
    """A finding of what was not."""
    return Finding(what, Result.NOT_TRIED, why)


def raised(what: str, error: BaseException) -> Finding:
    """A finding of what ended in an error."""
    return Finding(what, Result.FAILED, told(error))


def told(error: BaseException) -> str:
    """An error in one line: its kind, and the first line of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly to look.

    Attributes:
        device: What computes.
        quick: Smaller sizes, and without the compiler.
    """

    device: torch.device
    quick: bool = False


@dataclass(frozen=True)
class Check:
    """A concern, such as the forms of a layer.

    Attributes:
        help: What it looks at, in half a sentence.
        examine: Gives the findings, one as soon as it is there; what it raises is a finding too.
    """

    help: str
    examine: Callable[[Bench], Iterable[Finding]]


CHECKS: Registry[Check] = Registry("check", "hf_drt.doctor")
