"""A schedule: what the user wrote, checked, with boundaries still in the user's units."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NoReturn, cast

from hf_drt.schedule.boundary import Boundary, Run
from hf_drt.schedule.budget_step import (
    Form,
    budget_rank,
    budget_rank_and_dtype,
    budget_step,
    check_cost,
    full_rank_share,
    least_budget,
    least_seconds,
)
from hf_drt.schedule.dtypes import AUTO, DTYPES, split_dtype, with_dtype
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.parts import MIXED, Part, check_parts, parts_text
from hf_drt.schedule.plan import Kind, Phase, Plan
from hf_drt.schedule.presets import Preset, expand
from hf_drt.schedule.trigger import Trigger


@dataclass(frozen=True)
class Entry:
    """``kind[:rank][/dtype]@boundary``, or ``kind[:rank][k/n]+...[/dtype]@boundary``, of kind 'mixed', with parts. When
    the schedule is resolved, kind 'lowrank' becomes 'factored' or 'adapter', rank 'budget' a share, and dtype 'auto'
    one of :data:`hf_drt.schedule.DTYPES`."""

    kind: str
    rank: int | float | str | None
    at: Boundary
    parts: tuple[Part, ...] = ()
    dtype: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read one phase.

        Raises:
            ValueError: As the message says: no ``@``, an unknown kind, a rank, dtype or boundary that is none.
        """
        form, at, boundary = text.partition("@")
        if not at:
            raise ValueError(f"'{text}' has no boundary; a phase is written kind@boundary, e.g. dense@40%.")
        form, dtype = split_dtype(form, text)
        parts = tuple(Part.parse(part, text) for part in form.split("+"))
        at = Boundary.parse(boundary)
        if len(parts) == 1 and parts[0].group is None:
            return cls(parts[0].kind, parts[0].rank, at, dtype=dtype)
        check_parts(parts, text)
        return cls(MIXED, None, at, parts, dtype)

    @property
    def whole(self) -> tuple[Part, ...]:
        """The parts of a mixed phase; of another one, the one part that it is."""
        return self.parts or (Part(self.kind, self.rank),)

    def resolved_parts(self, lowrank: str) -> tuple[Part, ...]:
        """The parts of a mixed phase, 'lowrank' being what it stands for."""
        return tuple(replace(part, kind=lowrank) if part.kind == "lowrank" else part for part in self.parts)

    def __str__(self) -> str:
        return f"{with_dtype(parts_text(self.parts) or form_text(self.kind, self.rank), self.dtype)}@{self.at}"


@dataclass(frozen=True)
class Schedule:
    """The phases as written. ``str()`` gives text that parses to an equal schedule.

    With a ``trigger`` full-rank windows are added to the one phase during the run (:mod:`hf_drt.schedule.windows`).
    ``preset`` is what it was written as, if not phase by phase, and ``call`` the text; the same phases are the same
    schedule. ``adapters`` are the phases where 'lowrank' stands for adapters, if those are others: :meth:`where` has
    one or the other alone.
    """

    entries: tuple[Entry, ...]
    trigger: Trigger | None = None
    preset: Preset | None = field(default=None, compare=False, repr=False)
    adapters: tuple[Entry, ...] | None = None
    call: str = field(default="", compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read a schedule: phases separated by blanks, or a preset.

        Raises:
            ValueError: The text is empty, a phase cannot be read, the first one does not start at 0, or two neighbours
                are both dense, or two boundaries are at 'budget'.
        """
        words = text.split()
        if not words:
            raise ValueError("the schedule is empty; write e.g. 'factored@0 dense@40% adapter@80%'.")
        if "@" in text:
            return cls(_entries(text))
        expanded = expand(text) or _not_a_schedule(text)
        adapters = None if expanded.adapters is None else _entries(expanded.adapters)
        trigger = expanded.phases if isinstance(expanded.phases, Trigger) else None
        entries = _entries("lowrank@0" if isinstance(expanded.phases, Trigger) else expanded.phases)
        return cls(entries, trigger, expanded.preset, adapters, " ".join(words))

    def where(self, lowrank: str) -> "Schedule":
        """The schedule where 'lowrank' stands for a form, 'factored' or 'adapter'."""
        if self.adapters is None:
            return self
        if lowrank == "adapter":
            return replace(self, entries=self.adapters, adapters=None, trigger=None)
        return replace(self, adapters=None)

    @property
    def _any_entries(self) -> tuple[Entry, ...]:
        """The phases, whatever 'lowrank' stands for."""
        return (*self.entries, *(self.adapters or ()))

    @property
    def budget_chooses_rank(self) -> bool:
        """Whether a rank is left to the budget."""
        return any(entry.rank == "budget" for entry in self._any_entries)

    @property
    def budget_chooses_dtype(self) -> bool:
        """Whether a dtype is left to the budget, which then counts measured seconds in place of FLOPs."""
        return any(entry.dtype == AUTO for entry in self._any_entries)

    @property
    def dtypes(self) -> tuple[str | None, ...]:
        """What each phase computes in, None where that is what the run computes in; of each case of 'lowrank'."""
        return tuple(entry.dtype for entry in self._any_entries)

    @property
    def uses_budget(self) -> bool:
        """Whether a rank, a boundary or the windows of the run depend on a budget."""
        at_budget = any(entry.at.unit == "budget" for entry in self._any_entries)
        return self.trigger is not None or self.budget_chooses_rank or at_budget

    @property
    def writes_lowrank(self) -> bool:
        """Whether what the phases are depends on what 'lowrank' stands for."""
        return self.adapters is not None or any(part.kind == "lowrank" for e in self.entries for part in e.whole)

    def kinds(self, lowrank: str) -> list[str]:
        """The forms of its phases in order, 'lowrank' being what it stands for; of a mixed phase 'mixed'."""
        return [lowrank if entry.kind == "lowrank" else entry.kind for entry in self.where(lowrank).entries]

    @property
    def decides_groups(self) -> bool:
        """Whether the run decides which group has its turn."""
        return any(part.group is not None and not part.group.decided for e in self.entries for part in e.parts)

    @property
    def uses_lr(self) -> bool:
        """Whether a boundary depends on the run's learning rate."""
        return any(entry.at.uses_lr for entry in self._any_entries)

    def resolve(self, run: Run, lowrank: str = "factored") -> Plan:
        """The plan of integer phases.

        Args:
            run: The run's length, epochs and learning rate.
            lowrank: What 'lowrank' stands for: 'factored' from scratch, 'adapter' on pretrained weights.

        Raises:
            ValueError: A boundary cannot be resolved, or the phases do not form a :class:`Plan`.
        """
        if self.adapters is not None:
            return self.where(lowrank).resolve(run, lowrank)
        kinds, ranks, dtypes = self._forms(run, lowrank)
        known = [None if entry.at.unit == "budget" else entry.at.resolve(run) for entry in self.entries]
        forms: list[Form] = list(zip(kinds, ranks, strict=True))
        if self.budget_chooses_dtype:  # of whose steps the measured seconds are counted
            forms, run = list(zip(kinds, ranks, dtypes, strict=True)), replace(run, cost=run.seconds)
        starts = [budget_step(i, known, forms, run) if start is None else start for i, start in enumerate(known)]
        plan = Plan(tuple(map(Phase, starts, kinds, ranks, self._parts(lowrank), dtypes)), run.max_steps)
        if self.budget_chooses_rank:
            check_cost(plan, forms, run, full_rank_share(kinds, run))
        return plan

    def outline(self, run: Run, lowrank: str = "factored") -> Plan:
        """The plan's phases in number, kind and rank, as early as they could begin: for a run whose learning rate is
        not known yet. Arguments and ``Raises`` as in :meth:`resolve`."""
        schedule = self.where(lowrank)
        kinds, ranks, dtypes = schedule._forms(run, lowrank)
        return Plan(tuple(map(Phase, range(len(kinds)), kinds, ranks, schedule._parts(lowrank), dtypes)), run.max_steps)

    def least_budget(self, run: Run, lowrank: str = "factored") -> float:
        """The smallest budget for which a rank is found where 'lowrank' phases leave theirs to it; arguments as in
        :meth:`resolve`."""
        full_rank = full_rank_share(self.kinds(lowrank), run)
        if self.budget_chooses_dtype:
            dense = self.where(lowrank)._dense_dtype
            return min(least_seconds(lowrank, run, full_rank, dense, dtype) for dtype in DTYPES)
        return least_budget(lowrank, run, full_rank)

    @property
    def _dense_dtype(self) -> str:
        """What full-rank phases compute in, 'auto' where that is what the others do."""
        return next((entry.dtype for entry in self.entries if entry.kind == "dense" and entry.dtype), AUTO)

    def _parts(self, lowrank: str) -> list[tuple[Part, ...]]:
        return [entry.resolved_parts(lowrank) for entry in self.entries]

    def _forms(self, run: Run, lowrank: str) -> tuple[list[Kind], list[int | float | None], list[str | None]]:
        if run.max_steps < 1:
            raise ValueError(f"the schedule '{self}' never trains: the run has {run.max_steps} update steps.")
        kinds: list[Kind] = [cast(Kind, kind) for kind in self.kinds(lowrank)]
        full_rank, dtypes = full_rank_share(kinds, run), [entry.dtype for entry in self.entries]
        if self.budget_chooses_dtype:
            kind = next(kind for kind, entry in zip(kinds, self.entries, strict=True) if entry.rank == "budget")
            rank, dtype = budget_rank_and_dtype(kind, run, full_rank, self._dense_dtype)
            ranks = [rank if isinstance(entry.rank, str) else entry.rank for entry in self.entries]
            return kinds, ranks, [dtype if each == AUTO else each for each in dtypes]
        ranks = [
            budget_rank(kind, run, full_rank) if isinstance(entry.rank, str) else entry.rank
            for kind, entry in zip(kinds, self.entries, strict=True)
        ]
        return kinds, ranks, dtypes

    def __str__(self) -> str:
        if self.adapters is not None:
            return self.call
        return " ".join(map(str, self.entries)) if self.trigger is None else str(self.trigger)


def _entries(text: str) -> tuple[Entry, ...]:
    """The phases of a text, checked; ``Raises`` as :meth:`Schedule.parse`."""
    entries = tuple(map(Entry.parse, text.split()))
    first = entries[0]
    if first.at.unit in ("share", "steps", "epochs", "budget") and first.at.value != 0:
        raise ValueError(
            f"the first phase must start at step 0, got '{first}'. Write {first.kind}@0, or a phase before it, "
            f"e.g. lowrank@0 {first}."
        )
    if first.parts or first.kind == "frozen":
        raise ValueError(
            f"the first phase must bring all layers into a form that is trained, got '{first}'. Begin with lowrank@0, "
            f"e.g. lowrank@0 {parts_text(first.parts) or first.kind}@50%."
        )
    budgets = any(entry.at.unit == "budget" or entry.rank == "budget" for entry in entries)
    if budgets and (mixed := next((entry for entry in entries if entry.parts), None)):
        raise ValueError(
            f"'{mixed}' brings a group of layers into a form, and a budget decides ranks and boundaries of whole "
            f"phases alone, in '{text}'. Write the rank or the boundary itself."
        )
    _check_dtypes(entries, text)
    for before, after in pairwise(entries):
        if before.kind == after.kind == "dense" and before.dtype == after.dtype:
            raise ValueError(f"'{before} {after}' is one dense phase; drop the second.")
    if sum(entry.at.unit == "budget" for entry in entries) > 1:
        raise ValueError(f"'{text}' has several boundaries at 'budget'; one budget decides one boundary.")
    return entries


def _check_dtypes(entries: tuple[Entry, ...], text: str) -> None:
    """Whether those that are left to the budget are chosen with a rank, and leave nothing open; else ValueError."""
    if all(entry.dtype != AUTO for entry in entries):
        return
    if bare := next((entry for entry in entries if entry.dtype is None), None):
        raise ValueError(
            f"'{bare}' has no dtype, and the budget of '{text}' counts the seconds of every phase. Write one, e.g. "
            f"{form_text(bare.kind, bare.rank, AUTO)}@{bare.at}."
        )
    if anchor := next((entry for entry in entries if entry.at.uses_lr), None):
        raise ValueError(
            f"'{anchor}' begins at a learning rate, and a resumed run that has measured other seconds could not "
            f"compare its plan, of '{text}'. Give the boundary in % or steps, or write fp32 or bf16."
        )
    chosen = {entry.kind for entry in entries if entry.rank == "budget" and entry.dtype == AUTO}
    if len(chosen) != 1:
        raise ValueError(
            f"dtype 'auto' is chosen together with a rank, of one low-rank form, in '{text}'. Leave that to the budget "
            "too, e.g. lowrank:budget/auto@0, or write fp32 or bf16."
        )


def _not_a_schedule(text: str) -> NoReturn:
    if text.rpartition("/")[2] in DTYPES and "@" not in text:
        raise ValueError(
            f"'{text}' has a dtype and no boundary. A dtype belongs to a phase, e.g. factored/bf16@0; of a preset "
            "write the phases by hand, as its plan is printed, or set bf16=True for the whole run."
        )
    raise ValueError(
        f"'{text}' is not a schedule; write phases as kind@boundary, e.g. 'factored@0 dense@40% adapter@80%', or a "
        "preset."
    )
