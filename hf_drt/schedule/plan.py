"""A plan: the run cut into integer phases. Everything downstream of it knows update steps only."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hf_drt.schedule.counts import whole_number
from hf_drt.schedule.dtypes import DTYPES, recasts, with_dtype
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.parts import MIXED, Part, check_last, check_parts, parts_text

Kind = Literal["dense", "factored", "adapter", "frozen", "mixed"]


@dataclass(frozen=True)
class Phase:
    """Update steps ``[start, next phase's start)`` in one form, or, of kind 'mixed', with groups of layers in the forms
    that ``parts`` name, and the others in those that they had before.

    ``rank`` is None for the configuration's rank, a whole number for an absolute rank, a float for a share of
    min(out, in). ``dtype`` is what the phase computes in (autocast), one of :data:`hf_drt.schedule.DTYPES`, or None for
    what the run computes in.

    Raises:
        ValueError: A phase of parts is not mixed, or the other way round; there is no such dtype; and as
            :func:`check_parts`.
    """

    start: int
    kind: Kind
    rank: int | float | None = None
    parts: tuple[Part, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == MIXED) != bool(self.parts):
            raise ValueError(
                f"a phase has parts if and only if its kind is '{MIXED}', got '{self.kind}' and parts "
                f"'{parts_text(self.parts)}'."
            )
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype of a phase must be one of {', '.join(DTYPES)}, or None, got {self.dtype!r}.")
        check_parts(self.parts, str(self))

    @property
    def form(self) -> str:
        """What stands before the ``@``: ``factored:0.25/bf16``, or ``dense[2/8]+frozen[1/8]``."""
        return with_dtype(parts_text(self.parts) or form_text(self.kind, self.rank), self.dtype)

    @property
    def name(self) -> str:
        """The form without its rank, for tables that have a column of ranks: ``factored/bf16``."""
        return self.form if self.parts else with_dtype(self.kind, self.dtype)

    @property
    def whole(self) -> tuple[Part, ...]:
        """The parts of a mixed phase; of another one, the one part that it is."""
        return self.parts or (Part(self.kind, self.rank),)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The forms that the phase brings layers into."""
        return tuple(part.kind for part in self.whole)

    def __str__(self) -> str:
        return f"{self.form}@{self.start}"


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
        if self.phases[0].kind in (MIXED, "frozen"):
            raise ValueError(
                f"the first phase must bring all layers into a form that is trained, got the plan '{self}'. Begin with "
                "factored@0, dense@0 or adapter@0."
            )
        check_last(self.phases, str(self))
        for before, after in pairwise(self.phases):
            if after.start <= before.start:
                fewer = ", or take fewer groups or rounds" if after.parts else ""
                if not after.parts and after.kind == before.kind:
                    fewer = ", or take fewer stages or levels"
                raise ValueError(
                    f"phase boundaries cross: '{after}' does not come after '{before}' (of {self.max_steps} update "
                    f"steps). Move one of them, or train for more steps{fewer}."
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

    def form_start(self, index: int) -> int:
        """Update step at which the model came into the form of a phase: where the first of the phases began that differ
        in their dtypes alone."""
        while index and recasts(self.phases[index - 1], self.phases[index]):
            index -= 1
        return self.phases[index].start

    def recasts(self, before: int | None, index: int) -> bool:
        """Whether a phase differs from an earlier one in its dtype alone, and so do those between them."""
        return before is not None and before != index and self.form_start(index) <= self.phases[before].start

    def __len__(self) -> int:
        return len(self.phases)

    def __str__(self) -> str:
        return " ".join(map(str, self.phases))
