"""A plan: the run cut into integer phases. Everything downstream of it knows update steps only."""

from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Literal

from hf_drt.schedule.counts import whole_number

Kind = Literal["dense", "factored", "adapter"]


@dataclass(frozen=True)
class Phase:
    """Update steps ``[start, next phase's start)`` in one form.

    ``rank`` is None for the configuration's rank, a whole number for an absolute rank, a float for a share of
    min(out, in).
    """

    start: int
    kind: Kind
    rank: int | float | None = None

    def __str__(self) -> str:
        return f"{form_text(self.kind, self.rank)}@{self.start}"


@dataclass(frozen=True)
class Plan:
    """Phases of a run of ``max_steps`` update steps, sorted; the first one starts at step 0.

    Raises:
        ValueError: There is no step to train, the first phase does not start at 0, boundaries cross, a phase starts
            at or after the end, or a number of steps is none.
    """

    phases: tuple[Phase, ...]
    max_steps: int

    def __post_init__(self) -> None:
        whole_number("max_steps", self.max_steps)
        for phase in self.phases:
            whole_number(f"the start of a {phase.kind} phase", phase.start)
        if self.max_steps < 1:
            raise ValueError(f"the plan '{self}' never trains: the run has {self.max_steps} update steps.")
        if not self.phases or self.phases[0].start != 0:
            raise ValueError(f"the first phase must start at step 0, got the plan '{self}'.")
        for before, after in pairwise(self.phases):
            if after.start <= before.start:
                raise ValueError(
                    f"phase boundaries cross: '{after}' does not come after '{before}' (of {self.max_steps} update "
                    "steps). Move one of them, or train for more steps."
                )
        if self.phases[-1].start >= self.max_steps:
            raise ValueError(
                f"'{self.phases[-1]}' never trains: the run ends at step {self.max_steps}. "
                "Start the phase earlier, or train for more steps."
            )

    def index_at(self, step: int) -> int:
        """Index of the phase in which update ``step`` (0-based) is made; the last one from the end on.

        Raises:
            ValueError: ``step`` is negative, or no whole number.
        """
        if whole_number("step", step) < 0:
            raise ValueError(f"update steps are counted from 0, got {step}.")
        return bisect_right(self.phases, step, key=lambda phase: phase.start) - 1

    def end_of(self, index: int) -> int:
        """First update step after the phase."""
        return self.phases[index + 1].start if index + 1 < len(self.phases) else self.max_steps

    def __len__(self) -> int:
        return len(self.phases)

    def __str__(self) -> str:
        return " ".join(map(str, self.phases))


def form_text(kind: str, rank: int | float | str | None) -> str:
    """``factored``, ``factored:64`` (absolute), ``factored:0.25`` (share) or ``factored:budget``."""
    if rank is None:
        return kind
    if isinstance(rank, str):
        return f"{kind}:{rank}"
    text = f"{Decimal(repr(rank)):f}"  # never with an exponent
    return f"{kind}:{text}"
