"""Presets: names, with options, for schedules that are known by name. Each expands to plain schedule text, but
'adaptive', whose windows are decided during the run."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hf_drt.schedule.boundary import number_text
from hf_drt.schedule.plan import form_text
from hf_drt.schedule.trigger import Trigger

_CALL = re.compile(r"(\w+)\s*(?:\((.*)\))?")


def expand(text: str) -> str | Trigger | None:
    """The schedule text behind ``name`` or ``name(option=value, ...)``, the trigger behind 'adaptive'; None if the text
    is no preset at all.

    Raises:
        ValueError: Unknown preset or option, or a value outside its interval.
    """
    match = _CALL.fullmatch(text.strip())
    if match is None:
        return None
    name, inside = match[1], match[2] or ""
    if name not in PRESETS:
        raise ValueError(
            f"'{name}' is neither a preset ({', '.join(PRESETS)}) nor a phase; a phase is written kind@boundary, "
            "e.g. 'factored@0 dense@40% adapter@80%'."
        )
    builder, defaults = PRESETS[name]
    options = dict(defaults)
    for item in filter(None, (part.strip() for part in inside.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"preset '{name}' has no option '{key}'; its options are: {known}.")
        options[key] = _value(name, key, value, defaults[key])
    return builder(**options)


def _value(preset: str, key: str, text: str, default: Any) -> Any:
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError(f"option '{key}' of preset '{preset}' must be like {default!r}, got '{text}'.") from None


def _paper(final: str) -> str:
    """Low rank, full rank from I, adapter (or 'factored') from D (arXiv 2508.08625)."""
    _check(final in ("adapter", "factored"), "final", "adapter or factored", final)
    return f"lowrank@0 dense@I {final}@D"


def _paper_conv(ratio: float, final: str) -> str:
    """The settings of the paper for convolutions: low rank at half of the output channels, full rank from 37 % to 80 %
    of the run, then an adapter of the same rank (or 'factored') (arXiv 2508.08625)."""
    _check(0 < ratio <= 1, "ratio", "in (0, 1], a share of the output channels", ratio)
    _check(final in ("adapter", "factored"), "final", "adapter or factored", final)
    return f"{form_text('lowrank', ratio)}@0 dense@37% {form_text(final, ratio)}@80%"


def _fixed() -> str:
    """Low rank throughout."""
    return "lowrank@0"


def _warmup(until: float) -> str:
    """Full rank first, then low rank (Pufferfish, Wang et al. 2021)."""
    _check(0 < until < 100, "until", "in (0, 100), in % of the run", until)
    return f"dense@0 lowrank@{number_text(until)}%"


def _cyclic(windows: int, share: float) -> str:
    """Evenly spaced full-rank windows that together last ``share`` % of the run."""
    _check(windows >= 1, "windows", "at least 1", windows)
    _check(0 < share < 100, "share", "in (0, 100), in % of the run", share)
    phases = ["lowrank@0"]
    for i in range(windows):
        middle, half = 100 * (i + 0.5) / windows, share / windows / 2
        start, end = (number_text(round(share, 10)) for share in (middle - half, middle + half))
        phases += [f"dense@{start}%", f"lowrank@{end}%"]
    return " ".join(phases)


def _decay(first: float, last: float, stages: int, shape: str) -> str:
    """Factored rank going down in equal stages, from ``first`` to ``last`` of min(out, in) (DRIFT, 2502.03822)."""
    _check(0 < last < first <= 1, "first and last", "shares with 0 < last < first <= 1", f"{first:g} and {last:g}")
    _check(stages >= 2, "stages", "at least 2", stages)
    _check(shape in SHAPES, "shape", " or ".join(SHAPES), shape)
    ranks = [SHAPES[shape](first, last, j / (stages - 1)) for j in range(stages)]
    shares = (form_text("factored", round(rank, 10)) for rank in ranks)
    return " ".join(f"{form}@{number_text(round(100 * j / stages, 10))}%" for j, form in enumerate(shares))


def _sigmoid(first: float, last: float, t: float) -> float:
    """Logistic curve over 10 units, stretched so that it starts at ``first`` and ends at ``last``."""

    def raw(x: float) -> float:
        return 1 / (1 + math.exp(-10 * (x - 0.5)))

    return first + (last - first) * (raw(t) - raw(0)) / (raw(1) - raw(0))


SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda first, last, t: first + (last - first) * t,
    "exponential": lambda first, last, t: first * (last / first) ** t,
    "sigmoid": _sigmoid,
}


def _auto() -> str:
    """One knob, the budget: low rank first, full rank for as long as the budget allows; the rank follows as well."""
    return "lowrank:budget@0 dense@budget"


PRESETS: dict[str, tuple[Callable[..., str | Trigger], dict[str, Any]]] = {
    "paper": (_paper, {"final": "adapter"}),
    "paper_conv": (_paper_conv, {"ratio": 0.5, "final": "adapter"}),
    "fixed": (_fixed, {}),
    "warmup": (_warmup, {"until": 40.0}),
    "cyclic": (_cyclic, {"windows": 2, "share": 40.0}),
    "decay": (_decay, {"first": 0.375, "last": 0.125, "stages": 4, "shape": "linear"}),
    "auto": (_auto, {}),
    "adaptive": (Trigger, asdict(Trigger())),
}


def _check(condition: bool, name: str, allowed: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"preset option {name} must be {allowed}, got {value}.")
