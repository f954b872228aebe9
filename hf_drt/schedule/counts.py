"""Counts of update steps, as they come from the caller's hand."""

from numbers import Integral
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """The count as an int; NumPy's integers are whole numbers too.

    Raises:
        ValueError: It is a text, a float, True or False, or nothing at all.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number of update steps, got {value!r}, {_article(value)}.")
    return int(value)


def _article(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
