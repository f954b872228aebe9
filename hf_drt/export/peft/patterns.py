"""Rank and alpha of each layer, from the patterns of a LoRA checkpoint.

PEFT takes the first pattern that matches a layer's name, and sorts them as it saves. Where several match, the file can
say something else than was trained: the ranks stand in the tensors' shapes too, the alphas nowhere else.
"""

import functools
import re
from collections.abc import Callable
from typing import Any


def layer_rank(name: str, config: dict[str, Any], found: int) -> int:
    """Rank of a layer whose tensors are of rank ``found``: theirs, if any of the patterns that match says so too."""
    values = _matching(name, config.get("rank_pattern"))
    return found if found in values else [*values, config.get("r")][0]


def broken_by_sorting(name: str, config: dict[str, Any], rank: int) -> bool:
    """Whether the first pattern that matches says another rank."""
    return [*_matching(name, config.get("rank_pattern")), rank][0] != rank


def layer_alpha(name: str, config: dict[str, Any]) -> Any:
    """Alpha of a layer.

    Raises:
        ValueError: Patterns with different values match, and are in the order that PEFT's sorting gives.
    """
    patterns = config.get("alpha_pattern") or {}
    values = _matching(name, patterns)
    if len(set(values)) > 1 and list(patterns) == sorted(patterns):
        raise ValueError(
            f"several entries of alpha_pattern match {name}, with the values {', '.join(map(str, values))}. PEFT "
            "trains with the first, but sorts them as it saves, so that the file does not tell which that was. Leave "
            "in alpha_pattern only the right one for this layer."
        )
    return [*values, config.get("lora_alpha")][0]


def _matching(name: str, patterns: dict[str, Any] | None) -> list[Any]:
    """Values of the patterns that match all of the name, or what follows one of its dots; in the file's order."""
    return [value for pattern, value in (patterns or {}).items() if _matches(pattern, name)]


def _matches(pattern: str, name: str) -> bool:
    try:
        return _matcher()(pattern, name)
    except re.error as error:
        raise ValueError(
            f"rank_pattern or alpha_pattern holds {pattern!r}, which is not a regular expression: {error}."
        ) from None


@functools.cache
def _matcher() -> Callable[[str, str], bool]:
    """PEFT's own rule where it can be imported, which a later release may change; else that of PEFT 0.21."""
    try:
        from peft.utils.other import get_pattern_key
    except ImportError:
        return _as_in_peft

    # It gives the name back where no pattern matches: in brackets the pattern cannot read like the name.
    return lambda pattern, name: get_pattern_key([f"(?:{pattern})"], name) != name


def _as_in_peft(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
