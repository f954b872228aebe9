"""Parts of a phase: forms of groups of layers, where not all layers are in one form.

``dense[2/8]+frozen[1/8]`` brings group 2 of 8 to full rank and freezes group 1; all other layers stay as they are. In
place of a number stand ``next``, the group that needs full rank most of those whose turn has not come, and ``last``,
that of the turn before.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_drt.schedule.form_text import form_text, parse_rank

if TYPE_CHECKING:
    from hf_drt.schedule.plan import Phase

KINDS = ("dense", "factored", "adapter", "lowrank", "frozen")
LOW_RANK = frozenset({"factored", "adapter", "lowrank"})
MIXED = "mixed"  # kind of a phase of parts
NEXT, LAST = "next", "last"
_FORM = re.compile(r"([^:\[\]]*)(?::([^\[\]]*))?(?:\[([^\[\]]*)\])?")
_GROUP = re.compile(rf"(\d+|{NEXT}|{LAST})/(\d+)")


@dataclass(frozen=True)
class Group:
    """Group ``number`` of ``of``, counted from 1; or 'next' or 'last', which the run decides.

    Raises:
        ValueError: There is no such group.
    """

    number: int | Literal["next", "last"]
    of: int

    def __post_init__(self) -> None:
        if self.of < 2 or (isinstance(self.number, int) and not 1 <= self.number <= self.of):
            raise ValueError(
                f"'[{self}]' is not a group: there must be 2 or more, numbered from 1 to their count, e.g. [1/8]."
            )

    @property
    def decided(self) -> bool:
        """Whether it is known before the run."""
        return isinstance(self.number, int)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Part:
    """A form of one group of layers, or of all (None)."""

    kind: str
    rank: int | float | str | None = None
    group: Group | None = None

    @classmethod
    def parse(cls, text: str, entry: str) -> "Part":
        """Read ``kind``, ``kind:rank`` or ``kind:rank[k/n]``, of the phase ``entry``.

        Raises:
            ValueError: An unknown kind, or a rank or group that is none.
        """
        match = _FORM.fullmatch(text)
        kind, rank, group = match.groups() if match else (text, None, None)
        if kind not in KINDS:
            raise ValueError(f"'{kind}' in '{entry}' is not a form; allowed are {', '.join(KINDS)}.")
        if rank is not None and kind in ("dense", "frozen"):
            raise ValueError(f"'{entry}' gives a rank to the {kind} form, which has none; leave ':{rank}' out.")
        return cls(kind, None if rank is None else parse_rank(rank, entry), _group(group, entry))

    def __str__(self) -> str:
        return form_text(self.kind, self.rank) + (f"[{self.group}]" if self.group is not None else "")


def _group(text: str | None, entry: str) -> Group | None:
    if text is None:
        return None
    match = _GROUP.fullmatch(text)
    if match is None:
        raise ValueError(
            f"'[{text}]' in '{entry}' is not a group; write its number and their count, e.g. [1/8], or [next/8] or "
            "[last/8]."
        )
    number: Literal["next", "last"] | int = "last"
    if match[1] == NEXT:
        number = "next"
    elif match[1] != LAST:
        number = int(match[1])
    return Group(number, int(match[2]))


def check_parts(parts: Sequence[Part], phase: str) -> None:
    """Whether they make up a phase in which not all layers are in one form.

    Raises:
        ValueError: A part is of all layers, two are of the same group, may turn out to be, or are of another division;
            or a rank is left to the budget.
    """
    groups = [part.group for part in parts if part.group is not None]
    if len(groups) < len(parts):
        raise ValueError(f"'{phase}' has a part without a group; write each with its own, e.g. dense[2/8]+frozen[1/8].")
    if len({group.of for group in groups}) > 1 or len({group.number for group in groups}) < len(groups):
        raise ValueError(
            f"the parts of '{phase}' must be different groups of one division into so many, e.g. "
            "dense[2/8]+frozen[1/8]."
        )
    if len({group.decided for group in groups}) > 1:
        raise ValueError(
            f"'{phase}' has groups by number beside one that the run decides, which may turn out to be the same. Write "
            "numbers alone, or 'next' and 'last', e.g. dense[next/8]+frozen[last/8]."
        )
    if any(part.group.number == NEXT and part.kind != "dense" for part in parts if part.group is not None):
        raise ValueError(
            f"'{phase}' has 'next' in another form than dense; the turn is one of full rank: dense[next/8]."
        )
    if any(part.rank == "budget" for part in parts):
        raise ValueError(f"'{phase}' leaves the rank of a group to the budget, which decides that of all layers alone.")


def parts_text(parts: Sequence[Part]) -> str:
    """As it is written: ``dense[2/8]+frozen[1/8]``."""
    return "+".join(map(str, parts))


def check_last(phases: Iterable["Phase"], plan: str) -> None:
    """Whether the turn that 'last' is of, one of the same division, has come before it.

    Raises:
        ValueError: It has not.
    """
    turned: set[int] = set()
    for phase in phases:
        for group in (part.group for part in phase.parts if part.group is not None):
            if group.number == LAST and group.of not in turned:
                raise ValueError(
                    f"'{phase}' is of the group of the last turn, and there was none of {group.of} groups before it, "
                    f"in '{plan}'."
                )
        turned |= {part.group.of for part in phase.parts if part.group is not None and part.kind == "dense"}
