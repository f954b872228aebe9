"""What fits into a memory: plans that save more and more of it, tried in turn."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

RATIOS = (1 / 4, 1 / 8, 1 / 16)  # ranks of the layers that wait, the largest first
GROUPS = (4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """Settings of a run, as far as its memory depends on them.

    Attributes:
        settings: Fields of :class:`hf_drt.DRTConfig`, the schedule among them.
        checkpointing: Activation checkpointing of the whole run.
    """

    settings: dict[str, Any]
    checkpointing: bool = False

    def __str__(self) -> str:
        told = [f"--{name.replace('_', '-')} {_quoted(value)}" for name, value in self.settings.items()]
        return " ".join([*told, *(["--checkpointing"] if self.checkpointing else [])])


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) and "(" in value else f"{value}"


@dataclass(frozen=True)
class Trial:
    """A candidate that was looked at: the bytes of its largest phase, or of the first that was found above the limit;
    and whether that is within it."""

    candidate: Candidate
    peak: int
    fits: bool


@dataclass(frozen=True)
class Space:
    """What may be tried beside what was asked for, under settings that hold for all of it.

    Attributes:
        counts: Of groups, into which the layers can be divided.
        ratios: Ranks of the layers that wait, as shares of min(out, in), the largest first; None alone where the rank
            is given in another way.
        frozen_dtype: Whether there are layers that a frozen W of fewer bits is for.
        checkpointing: Whether the whole run can be checkpointed; not beside settings that checkpoint single phases.
    """

    counts: Collection[int]
    ratios: tuple[float | None, ...] = RATIOS
    frozen_dtype: bool = True
    checkpointing: bool = True


def fitting(
    limit: int, given: Candidate, space: Space, peak: Callable[[Candidate], int]
) -> tuple[list[Trial], Candidate | None]:
    """All trials, and the candidate that is proposed: the first that fits.

    They are, in this order: what was asked for, without and with activation checkpointing; then full rank in turns
    (the preset rotate), of the largest rank that can fit at all the one with the fewest groups, without and with
    checkpointing.

    Args:
        limit: Bytes.
        given: What was asked for.
        space: What else can be tried.
        peak: Gives the bytes of a candidate's largest phase, or of one that is above the limit.
    """
    trials: list[Trial] = []

    def fits(candidate: Candidate) -> bool:
        known = next((trial for trial in trials if trial.candidate == candidate), None)
        if known is None:
            size = peak(candidate)
            known = Trial(candidate, size, size <= limit)
            trials.append(known)
        return known.fits

    asked = dict.fromkeys((given.checkpointing, True)) if space.checkpointing else (given.checkpointing,)
    found = next((c for on in asked if fits(c := replace(given, checkpointing=on))), None)
    if found is not None:
        return trials, found
    for ratio in space.ratios if space.counts else ():
        *others, smallest = _turns(ratio, space)
        if fits(smallest):
            return trials, next((candidate for candidate in others if fits(candidate)), smallest)
    return trials, None


def _turns(ratio: float | None, space: Space) -> Iterator[Candidate]:
    """Rotations at a rank, each smaller than the one before."""
    beside: dict[str, Any] = {} if ratio is None else {"rank_ratio": ratio}
    beside |= {"frozen_dtype": "bfloat16"} if space.frozen_dtype else {}
    for checkpointing in (False, True) if space.checkpointing else (False,):
        for count in [count for count in GROUPS if count in space.counts] or space.counts:
            yield Candidate({"schedule": f"rotate(groups={count})"} | beside, checkpointing)
