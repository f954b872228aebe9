"""The preset drift: DRIFT's curves (arXiv 2502.03822), computed here by its own formulas, met by levels of rank."""

import math
from dataclasses import replace

import pytest

from hf_drt import DRTConfig, Run, Schedule
from hf_drt.schedule.drift import CURVES, gone

EPOCHS = 1000


def by_hand(shape: str, i: int, r_max: float, r_min: float, k: float = 10.0, m: float = 0.5) -> float:
    """DRIFT's rank in epoch i of EPOCHS, with tau = k / EPOCHS and t_m = m EPOCHS; not yet rounded down."""
    tau = k / EPOCHS
    match shape:
        case "linear":
            return r_max + (r_min - r_max) * i / EPOCHS
        case "cosine":
            return r_min + 0.5 * (r_max - r_min) * (1 + math.cos(math.pi * i / EPOCHS))
        case "sigmoid":
            return r_max - (r_max - r_min) / (1 + math.exp(-tau * (i - m * EPOCHS)))
        case "exponential":
            return r_min + (r_max - r_min) * math.exp(-tau * i)
        case "logarithmic":  # of a run of k epochs, which are EPOCHS steps here
            return r_min + (r_max - r_min) / (1 + math.log(i * k / EPOCHS + 1) / math.log(2))
    raise AssertionError(shape)


def stretched(shape: str, i: int, first: float, last: float, *knobs: float) -> float:
    """So that it begins at the first rank and ends at the last."""
    begin, now, end = (by_hand(shape, at, first, last, *knobs) for at in (0, i, EPOCHS))
    return first + (last - first) * (now - begin) / (end - begin)


KNOBS = [("linear",), ("cosine",), ("sigmoid",), ("sigmoid", 25.0, 0.3), ("sigmoid", 2.0, 0.8), ("exponential",),
         ("exponential", 3.0), ("logarithmic",), ("logarithmic", 200.0)]  # fmt: skip
knobs = pytest.mark.parametrize("knob", KNOBS, ids=str)


def text_of(knob: tuple, **options) -> str:
    names = dict(zip(("shape", "steepness"), knob, strict=False))
    names |= {"midpoint": 100 * knob[2]} if len(knob) > 2 else {}
    return f"drift({','.join(f'{name}={value}' for name, value in (names | options).items())})"


@knobs
def test_the_curves_are_those_of_the_paper(knob):
    for i in range(0, EPOCHS + 1, 50):
        k, m = (*knob[1:], *(10.0, 0.5)[len(knob) - 1 :])
        raw = by_hand(knob[0], i, 1.0, 0.0, *knob[1:])
        assert CURVES[knob[0]].share(i / EPOCHS, k, m) == pytest.approx(1 - raw, abs=1e-12)
        share = gone(knob[0], i / EPOCHS, k, m)
        assert 1 - share == pytest.approx(stretched(knob[0], i, 1.0, 0.0, *knob[1:]), abs=1e-12)


@knobs
@pytest.mark.parametrize(("first", "last"), [(0.5, 0.125), (0.1, 0.8)])
@pytest.mark.parametrize(("levels", "until"), [(2, 100), (7, 100), (9, 60)])
def test_at_any_step_the_rank_is_the_level_next_to_the_curve(knob, first, last, levels, until):
    text = text_of(knob, first=first, last=last, levels=levels, until=until)
    plan = Schedule.parse(text).resolve(Run(EPOCHS * 100))
    assert [phase.rank for phase in plan.phases] == pytest.approx(
        [first + (last - first) * j / (levels - 1) for j in range(levels)], abs=1e-6
    )
    half = abs(last - first) / (levels - 1) / 2
    for i in range(EPOCHS):
        wanted = stretched(knob[0], min(EPOCHS, round(i * 100 / until)), first, last, *knob[1:])
        now, near = (plan.phases[plan.index_at(at)].rank for at in (i * 100, min(EPOCHS - 1, i + 2) * 100))
        # next to a boundary the curve's epoch and the level's step are rounded apart
        assert min(abs(now - wanted), abs(near - wanted)) <= half + 1e-3


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("drift(shape=linear,levels=3,last=0.2)", "adapter:0.5@0 adapter:0.35@25% adapter:0.2@75%"),
        ("drift(shape=linear,levels=2,until=50)", "adapter:0.5@0 adapter:0.125@25%"),
        ("drift(first=1,shape=linear,levels=3,last=0.1)", "dense@0 adapter:0.55@25% adapter:0.1@75%"),
        ("drift(first=0.1,last=1,shape=linear,levels=3)", "adapter:0.1@0 adapter:0.55@25% dense@75%"),
        ("drift(levels=3,steepness=20,midpoint=30)", "adapter:0.5@0 adapter:0.3125@24.5563% adapter:0.125@35.5095%"),
    ],
)  # fmt: skip
def test_what_it_stands_for(text, phases):
    assert str(Schedule.parse(text)) == phases


@knobs
@pytest.mark.parametrize("options", [{}, {"first": 1.0, "levels": 3}, {"last": 0.9, "until": 12.5}], ids=str)
def test_its_text_reads_back_as_the_same_schedule(knob, options):
    schedule = Schedule.parse(text_of(knob, **options))
    assert Schedule.parse(str(schedule)) == schedule
    plan = schedule.resolve(Run(10**6))
    assert Schedule.parse(str(plan)).resolve(Run(10**6)) == plan


def test_levels_that_begin_at_the_same_time_are_one():
    assert str(Schedule.parse("drift(until=0.001,levels=7)")) == "adapter:0.5@0 adapter:0.4375@0.0003% " \
        "adapter:0.375@0.0004% adapter:0.25@0.0005% adapter:0.1875@0.0006% adapter:0.125@0.0007%"  # fmt: skip


def test_it_brings_adapters_that_are_split_and_moments_that_follow():
    config = DRTConfig(schedule="drift")
    assert (config.adapter_init, config.moments, config.brought) == ("split", "project", {"adapter_init", "moments"})
    own = DRTConfig(schedule="drift", adapter_init="principal", moments="reset")
    assert (own.adapter_init, own.moments, own.brought) == ("principal", "reset", frozenset())
    other = replace(DRTConfig(schedule="paper"), schedule="drift")  # nothing of the one schedule stays for the other
    assert (other.adapter_init, other.moments) == ("split", "project")
    plain = DRTConfig(schedule="adapter@0").settled("adapter")
    assert (plain.adapter_init, plain.moments, plain.changed()) == ("zero", "reset", {})
