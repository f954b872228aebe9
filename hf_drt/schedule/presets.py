"""Presets: names, with options, for schedules that are known by name. Each expands to plain schedule text, but
'adaptive', whose windows are decided during the run.

A preset is added in one place, :data:`PRESETS` (from outside: :func:`register`); errors, the help of ``drt_schedule``
and the table of the documentation are made of it. Phases, settings and budget may be others where 'lowrank' stands for
factors, in a new model, than where it stands for adapters, in a pretrained one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_drt.registry import Registry
from hf_drt.schedule.boundary import number_text
from hf_drt.schedule.decay import SHAPES
from hf_drt.schedule.drift import CURVES, MIDPOINT, MOST_LEVELS, STEEPNESS, drift
from hf_drt.schedule.dtypes import AUTO, DTYPES, with_dtype
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.rotation import AFTER, ORDERS, rotation
from hf_drt.schedule.trigger import Trigger

_CALL = re.compile(r"(\w+)\s*(?:\((.*)\))?")
_OWN = "run"  # the precision that the run has anyway
LOWRANK = "lowrank"  # what a setting may follow beside other settings
AUTO_BUDGET = 0.2
"""Share of the dense training FLOPs that 'auto' takes in factors, where nothing else is set."""


@dataclass(frozen=True)
class Follows:
    """A value that follows another setting, whose name is ``setting``; or the form, 'factored' or 'adapter', that
    'lowrank' stands for, where that is ``setting``."""

    setting: str
    values: Mapping[Any, Any]

    def __str__(self) -> str:
        if self.setting == LOWRANK:
            return ", ".join(f"{value} in {form} form" for form, value in self.values.items())
        return f"{', '.join(f'{value:g}' for value in self.values.values())} by {self.setting}"


@dataclass(frozen=True)
class Preset:
    """A schedule that is known by name.

    Attributes:
        name: Of letters, digits and underscores.
        help: What it does, in one sentence; for help texts and tables.
        build: Makes the schedule's text of the options, or a trigger.
        options: Every option of ``build`` with its default, whose type is the option's.
        settings: Values of fields of :class:`hf_drt.DRTConfig` that the user leaves unset (None); each may be a
            :class:`Follows`.
        adapters: Makes the schedule's text where 'lowrank' stands for adapters, of the same options; None: ``build``
            makes it too.
        budget: The budget where 'lowrank' stands for factors and the user leaves it unset, in (0, 1]; None: that of a
            schedule without a name.
        instead: Preset that brings none of this one's settings, for messages; and whose phases an earlier version may
            have meant by this one's name.
    """

    name: str
    help: str
    build: Callable[..., str | Trigger]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapters: Callable[..., str] | None = None
    budget: float | None = None
    instead: str | None = None

    def settings_for(self, config: Any, lowrank: str | None = None) -> dict[str, Any]:
        """The settings that go with it, by name, under the other settings of a configuration and with what 'lowrank'
        stands for, if that is known; those that follow a value for which there is none are left out."""

        def followed(setting: str) -> Any:
            return lowrank if setting == LOWRANK else getattr(config, setting)

        found = {
            name: value.values.get(followed(value.setting)) if isinstance(value, Follows) else value
            for name, value in self.settings.items()
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def call(self) -> str:
        """As it is written with all its options at their defaults: ``cyclic(windows=2,share=40)``."""
        given = ",".join(f"{name}={_text(value)}" for name, value in self.options.items())
        return f"{self.name}({given})" if given else self.name


def _text(value: Any) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


def preset_of(text: str) -> Preset | None:
    """The preset that a schedule's text names; None if the text is not of that kind.

    Raises:
        ValueError: No preset has this name.
    """
    match = _CALL.fullmatch(text.strip())
    if match is None:
        return None
    if match[1] not in PRESETS:
        raise ValueError(
            f"'{match[1]}' is neither a preset ({', '.join(PRESETS)}) nor a phase; a phase is written kind@boundary, "
            "e.g. 'factored@0 dense@40% adapter@80%'."
        )
    return PRESETS[match[1]]


@dataclass(frozen=True)
class Expanded:
    """What a preset with its options stands for: the text of the schedule, or a trigger; and the text where 'lowrank'
    stands for adapters, if that is another."""

    preset: Preset
    phases: str | Trigger
    adapters: str | None


def expand(text: str) -> Expanded | None:
    """What ``name`` or ``name(option=value, ...)`` stands for; None if the text is no preset at all.

    Raises:
        ValueError: Unknown preset or option, or a value outside its interval.
    """
    preset = preset_of(text)
    if preset is None:
        return None
    inside = text.strip()[len(preset.name) :].strip()[1:-1]
    options = dict(preset.options)
    for item in filter(None, (part.strip() for part in inside.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in preset.options:
            known = ", ".join(preset.options) or "none"
            raise ValueError(f"preset '{preset.name}' has no option '{key}'; its options are: {known}.")
        options[key] = _value(preset.name, key, value, preset.options[key])
    return Expanded(preset, preset.build(**options), preset.adapters(**options) if preset.adapters else None)


def _value(preset: str, key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"option '{key}' of preset '{preset}' must be true or false, got '{text}'.")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError(f"option '{key}' of preset '{preset}' must be like {default!r}, got '{text}'.") from None


def register(preset: Preset) -> None:
    """Add a preset: schedules, errors and help texts know it from here on.

    Raises:
        ValueError: Its name is taken, or is not a word; an option's default tells no type that can be written; or it
            brings adapter_alpha by the form.
    """
    for name, value in preset.options.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"option '{name}' of preset '{preset.name}' needs a default that is a number, a text, True or False, "
                f"by which what users write is read, got {value!r}."
            )
    alpha = preset.settings.get("adapter_alpha")
    if isinstance(alpha, Follows) and alpha.setting == LOWRANK:
        raise ValueError(
            f"preset '{preset.name}' brings adapter_alpha by what '{LOWRANK}' stands for, but adapters alone have one. "
            "Give the value itself."
        )
    if not re.fullmatch(r"\w+", preset.name):
        raise ValueError(f"a preset needs a name of letters, digits and underscores, got {preset.name!r}.")
    PRESETS.add(preset.name, preset)


def preset_rows() -> list[tuple[str, str, str]]:
    """Every preset: as it is written, what it does, and the settings that it brings."""
    return [(preset.call, preset.help, ", ".join(_brings(preset)) or "-") for preset in PRESETS.values()]


def _brings(preset: Preset) -> Iterator[str]:
    yield from (f"{name} {value}" for name, value in preset.settings.items())
    if preset.budget is not None:
        yield f"budget {Follows(LOWRANK, {'factored': preset.budget})}"


def _paper(final: str) -> str:
    _check(final in ("adapter", "factored"), "final", "adapter or factored", final)
    return f"lowrank@0 dense@I {final}@D"


def _paper_conv(ratio: float, final: str) -> str:
    """As arXiv 2508.08625 trains convolutions; ``final`` has the rank of the beginning."""
    _check(0 < ratio <= 1, "ratio", "in (0, 1], a share of the output channels", ratio)
    _check(final in ("adapter", "factored"), "final", "adapter or factored", final)
    return f"{form_text('lowrank', ratio)}@0 dense@37% {form_text(final, ratio)}@80%"


def _fixed() -> str:
    return "lowrank@0"


def _warmup(until: float) -> str:
    _check(0 < until < 100, "until", "in (0, 100), in % of the run", until)
    return f"dense@0 lowrank@{number_text(until)}%"


def _cyclic(windows: int, share: float) -> str:
    """Window i of n has its middle at 100 (i + 1/2) / n % of the run, and lasts share / n %."""
    _check(windows >= 1, "windows", "at least 1", windows)
    _check(0 < share < 100, "share", "in (0, 100), in % of the run", share)
    phases = ["lowrank@0"]
    for i in range(windows):
        middle, half = 100 * (i + 0.5) / windows, share / windows / 2
        start, end = (number_text(round(share, 10)) for share in (middle - half, middle + half))
        phases += [f"dense@{start}%", f"lowrank@{end}%"]
    return " ".join(phases)


def _decay(first: float, last: float, stages: int, shape: str) -> str:
    """Stage j of n begins at 100 j / n % of the run, in rank ``shape(first, last, j / (n - 1))``, a share of
    min(out, in) (:data:`hf_drt.schedule.decay.SHAPES`)."""
    _check(0 < last < first <= 1, "first and last", "shares with 0 < last < first <= 1", f"{first:g} and {last:g}")
    _check(stages >= 2, "stages", "at least 2", stages)
    _check(shape in SHAPES, "shape", " or ".join(SHAPES), shape)
    ranks = [SHAPES[shape](first, last, j / (stages - 1)) for j in range(stages)]
    shares = (form_text("factored", round(rank, 10)) for rank in ranks)
    return " ".join(f"{form}@{number_text(round(100 * j / stages, 10))}%" for j, form in enumerate(shares))


def _drift(first: float, last: float, shape: str, steepness: float, midpoint: float, until: float, levels: int) -> str:
    given = f"{first:g} and {last:g}"
    _check(0 < first <= 1 and 0 < last <= 1, "first and last", "shares of min(out, in) in (0, 1]", given)
    _check(first != last, "first and last", f"different (one rank throughout is the schedule 'adapter:{first:g}@0')",
           given)  # fmt: skip
    _check(shape in CURVES, "shape", f"one of {', '.join(CURVES)}", shape)
    for name, value, default in (("steepness", steepness, STEEPNESS), ("midpoint", midpoint, MIDPOINT)):
        users = " or ".join(other for other, curve in CURVES.items() if name in curve.options)
        reads = name in CURVES[shape].options
        _check(reads or value == default, name, f"left out but for shape={users}", f"{value:g} with shape={shape}")
    _check(0.01 <= steepness <= 1000, "steepness", "in [0.01, 1000]", steepness)
    _check(0 < midpoint < 100, "midpoint", "in (0, 100), in % of until", midpoint)
    _check(0 < until <= 100, "until", "in (0, 100], in % of the run", until)
    allowed = f"in 2..{MOST_LEVELS}, since each but the first costs a switch"
    _check(2 <= levels <= MOST_LEVELS, "levels", allowed, levels)
    return drift(first, last, shape, steepness, midpoint, until, levels)


def _rotate(groups: int, share: float, order: str, after: str, rounds: int, seed: int) -> str:
    _check(groups >= 2, "groups", "at least 2", groups)
    _check(0 < share < 100, "share", "in (0, 100), in % of the run", share)
    _check(order in ORDERS, "order", " or ".join(ORDERS), order)
    _check(after in AFTER, "after", " or ".join(AFTER), after)
    _check(rounds >= 1, "rounds", "at least 1", rounds)
    _check(seed == 0 or order == "random", "seed", "left out but for order=random", seed)
    return rotation(groups, share, order, after, rounds, seed)


def _auto(precision: str) -> str:
    return f"{form_text('lowrank', 'budget', _dtype(precision))}@0"


def _auto_late(precision: str) -> str:
    dtype = _dtype(precision)
    return f"{form_text('lowrank', 'budget', dtype)}@0 {with_dtype('dense', dtype)}@budget"


def _dtype(precision: str) -> str | None:
    _check(precision in (_OWN, AUTO, *DTYPES), "precision", f"{_OWN}, {', '.join(DTYPES)} or {AUTO}", precision)
    return None if precision == _OWN else precision


_PRESETS = (
    Preset(
        "paper",
        "Low rank, full rank from I, adapter (or final=factored) from D, by the drops of the learning rate "
        "(arXiv 2508.08625).",
        _paper,
        {"final": "adapter"},
    ),
    Preset(
        "paper_conv",
        "The paper's settings for convolutions: half of the output channels, full rank from 37 % to 80 % of the run, "
        "then an adapter.",
        _paper_conv,
        {"ratio": 0.5, "final": "adapter"},
        {"adapter_alpha": Follows("decomposition", {"svd": 16.0, "tucker": 1.0, "cp": 64.0})},
    ),
    Preset("fixed", "Low rank throughout.", _fixed),
    Preset("warmup", "Full rank first, then low rank (Pufferfish, Wang et al. 2021).", _warmup, {"until": 40.0}),
    Preset(
        "cyclic",
        "Low rank with evenly spaced full-rank windows that together last share % of the run.",
        _cyclic,
        {"windows": 2, "share": 40.0},
    ),
    Preset(
        "decay",
        "Factored rank going down in equal stages, each of which truncates; shape is linear, exponential or sigmoid.",
        _decay,
        {"first": 0.375, "last": 0.125, "stages": 4, "shape": "linear"},
    ),
    Preset(
        "drift",
        "Adapters that hold W's principal directions, in a rank that falls or grows by levels while the frozen base "
        "takes or gives the rest, so that no change of rank changes the function (DRIFT, arXiv 2502.03822). shape is "
        f"{', '.join(CURVES)}; first=1 is full rank.",
        _drift,
        {
            "first": 0.5,
            "last": 0.125,
            "shape": "sigmoid",
            "steepness": STEEPNESS,
            "midpoint": MIDPOINT,
            "until": 100.0,
            "levels": 7,
        },
        {"adapter_init": "split", "moments": "project"},
    ),
    Preset(
        "rotate",
        "Full rank in turns, in about the memory of low rank: for the last share % of the run one group of layers "
        "after the other is dense; then it is frozen (after=adapter, lowrank or factored: in that form). order is "
        "ascending, descending, random or need.",
        _rotate,
        {"groups": 8, "share": 30.0, "order": "ascending", "after": "frozen", "rounds": 1, "seed": 0},
    ),
    Preset(
        "auto",
        "One knob, the budget, from which the rank follows: low rank throughout, the factors trained by an optimizer "
        "of their own; a pretrained model as by auto_late, in adapters. precision is run (the run's own), fp32, bf16, "
        "or auto: chosen with the rank, by measured seconds.",
        _auto,
        {"precision": _OWN},
        settings={
            "matrix_optimizer": Follows(LOWRANK, {"factored": "muon"}),
            "dense_query_key": Follows(LOWRANK, {"factored": False}),
        },
        adapters=_auto_late,
        budget=AUTO_BUDGET,
        instead="auto_late",
    ),
    Preset(
        "auto_late",
        "One knob, the budget: low rank first, full rank for as long as the budget allows; the rank follows as well. "
        "precision as in auto.",
        _auto_late,
        {"precision": _OWN},
    ),
    Preset(
        "adaptive",
        "Low rank with full-rank windows that begin during the run, as the effective rank or the loss (signal=rank, "
        "loss or either) asks for them.",
        Trigger,
        asdict(Trigger()),
    ),
)
PRESETS: Registry[Preset] = Registry("preset", "hf_drt.schedule")
for _preset in _PRESETS:
    register(_preset)


def _check(condition: bool, name: str, allowed: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"preset option {name} must be {allowed}, got {value}.")
