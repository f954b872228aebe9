"""Regular expressions in settings, and the ranks that they give: read and checked. Standard library only."""

import json
import re
from typing import Any


def check_patterns(name: str, patterns: Any) -> None:
    """Whether a setting is a list of regular expressions, or None.

    Raises:
        ValueError: It is not; the message names the setting.
    """
    if patterns is None:
        return
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name} must be a list of regular expressions, got {patterns!r}.")
    for pattern in patterns:
        _compile(name, pattern)


def _compile(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} holds {pattern!r}, which is not a regular expression: {error}. "
            "Match any text with '.*', and escape special characters with a backslash."
        ) from None


def parse_rank_pattern(value: Any) -> dict[str, float] | None:
    """``rank_pattern`` as a dict; a text is read as JSON, since that is how a command line carries it.

    Raises:
        ValueError: It is no such text or dict, an expression is none, or a rank is neither a whole number of at least 1
            nor a share with a decimal point in (0, 1].
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'rank_pattern is not valid JSON ({error}): {value!r}. Write it as \'{{"attn": 0.125, "mlp": 64}}\'.'
            ) from None
    if not isinstance(value, dict):
        raise ValueError(f"rank_pattern must map regular expressions to ranks, got {value!r}.")
    for pattern, rank in value.items():
        if not isinstance(pattern, str):
            raise ValueError(f"rank_pattern must map regular expressions to ranks, got the key {pattern!r}.")
        _compile("rank_pattern", pattern)
        absolute, share = type(rank) is int and rank >= 1, isinstance(rank, float) and 0 < rank <= 1
        if not (absolute or share):
            raise ValueError(
                f"rank_pattern gives {rank!r} for {pattern!r}; allowed is a whole number of at least 1 (a rank), or a "
                "number with a decimal point in (0, 1] (a share of min(out, in))."
            )
    return dict(value)
