"""Boundaries: the ``@...`` part of a schedule, and how each becomes an update step before the run."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from numbers import Real

from hf_drt.schedule.counts import whole_number

logger = logging.getLogger(__name__)

_PATTERNS = {
    "share": re.compile(r"(\d+(?:\.\d+)?)%"),
    "steps": re.compile(r"(\d+)(?:steps?)?"),
    "epochs": re.compile(r"(\d+(?:\.\d+)?)ep"),
    "lr_below": re.compile(r"lr<(\d*\.?\d+)"),
    "lr_above": re.compile(r"lr>(\d*\.?\d+)"),
    "paper": re.compile(r"([ID])"),
    "budget": re.compile(r"(budget)"),
}
ALLOWED = (
    "a share (40%), update steps (400), epochs (1.5ep), an LR anchor (lr<0.9, lr>0.5), I / D of the paper, or budget"
)


@dataclass(frozen=True)
class Run:
    """What is known of a run before it starts.

    Attributes:
        max_steps: Update steps of the run.
        steps_per_epoch: Update steps of one epoch, or None where the data have no length.
        lr: Gives the scheduled learning rate of every update step, or None where the scheduler cannot be evaluated
            beforehand; called only if a boundary needs it.
        budget: Share of the FLOPs of dense training that the plan may take, in (0, 1], or None.
        cost: Gives the FLOPs per step of a phase of a kind ('dense', 'factored', 'adapter') and rank relative to dense,
            or None; needed if a boundary is at ``budget``.
        seconds: Gives the seconds per step of a phase of a kind, rank and dtype ('fp32', 'bf16') relative to dense in
            fp32, or None; takes the place of ``cost`` where the budget decides a dtype.

    Raises:
        ValueError: A number is none, or outside its interval. (A run without a step is refused by the schedule.)
    """

    max_steps: int
    steps_per_epoch: float | None = None
    lr: Callable[[], Sequence[float] | None] = lambda: None
    budget: float | None = None
    cost: Callable[[str, int | float | None], float] | None = None
    seconds: Callable[[str, int | float | None, str], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_steps", whole_number("max_steps", self.max_steps))
        epoch, budget = self.steps_per_epoch, self.budget
        if epoch is not None and not (_is_number(epoch) and epoch > 0):
            raise ValueError(f"steps_per_epoch must be a number above 0, or None, got {epoch!r}.")
        if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
            raise ValueError(f"budget must be in (0, 1], or None, got {budget!r}. It is a share of dense FLOPs.")
        if not callable(self.lr):
            raise ValueError(
                f"lr must be a function that returns the learning rate of every update step, got {self.lr!r}. Write "
                "lr=lambda: rates."
            )

    @cached_property
    def curve(self) -> Sequence[float] | None:
        """LR of update steps 0 .. max_steps - 1, or None."""
        return self.lr()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Boundary:
    """One boundary, unresolved. ``unit`` is a key of the table above; ``value`` its number, or its own text."""

    unit: str
    value: float | int | str

    @classmethod
    def parse(cls, text: str) -> "Boundary":
        """Read the text after ``@``.

        Raises:
            ValueError: It has none of the allowed forms, or its value is outside its interval.
        """
        for unit, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(text):
                number = int if unit == "steps" else str if unit in ("paper", "budget") else float
                return cls(unit, number(match[1]))
        raise ValueError(f"'{text}' is not a phase boundary; allowed is {ALLOWED}.")

    def __post_init__(self) -> None:
        if self.unit == "share" and not 0 <= float(self.value) < 100:
            raise ValueError(f"a boundary in % must lie in [0, 100), got {self}. A phase at 100% would never train.")
        if self.is_anchor and not 0 < float(self.value) < 1:
            raise ValueError(f"an LR anchor must lie in (0, 1), got {self}. It is a share of the schedule's peak LR.")

    @property
    def is_anchor(self) -> bool:
        """Whether it is an LR anchor."""
        return self.unit in ("lr_below", "lr_above")

    @property
    def uses_lr(self) -> bool:
        """Whether its step depends on the run's learning rate."""
        return self.is_anchor or self.unit == "paper"

    def __str__(self) -> str:
        number = self.value if isinstance(self.value, str) else number_text(self.value)
        if self.unit == "steps":
            return number
        return {"share": f"{number}%", "epochs": f"{number}ep", "paper": number, "budget": number}.get(
            self.unit, f"lr{'<' if self.unit == 'lr_below' else '>'}{number}"
        )

    def resolve(self, run: Run) -> int:
        """The update step at which the phase starts; not for the unit 'budget', which depends on the other phases.

        Raises:
            ValueError: The run lacks what the unit needs: an epoch's length, or an LR that gets there.
        """
        match self.unit:
            case "share":
                return int(float(self.value) / 100 * run.max_steps + 0.5)
            case "steps":
                return int(self.value)
            case "epochs":
                if run.steps_per_epoch is None:
                    raise ValueError(f"'@{self}' needs data of known length; give the boundary in % or steps.")
                return int(float(self.value) * run.steps_per_epoch + 0.5)
            case "paper":
                return _paper_step(str(self.value), run)
            case _:
                return self._lr_step(run)

    def _lr_step(self, run: Run) -> int:
        if run.curve is None:
            raise ValueError(
                f"'@{self}' needs a learning-rate schedule that can be evaluated before the run; "
                "this one depends on the training itself, or is unknown. Give the boundary in % or steps."
            )
        peak = max(run.curve)
        if peak <= 0:
            raise ValueError(f"'@{self}' needs a learning rate above 0, but the schedule's peak is {peak:g}.")
        top, anchor = run.curve.index(peak), float(self.value) * peak
        for step, lr in enumerate(run.curve):
            below = self.unit == "lr_below" and step > top and lr < anchor
            above = self.unit == "lr_above" and lr > anchor
            if below or above:
                return step
        lowest = min(run.curve[top + 1 :], default=peak) / peak
        raise ValueError(
            f"'@{self}' is never reached: after its peak {peak:g} at step {top} the learning rate's lowest is "
            f"{lowest:.3g} of it. Choose an anchor above that, or give the boundary in % or steps."
        )


def number_text(value: float) -> str:
    """Decimal text, without an exponent, that reads back as the same number; whole numbers without a point."""
    text = f"{Decimal(repr(value)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def lr_drops(curve: Sequence[float]) -> list[int]:
    """Steps at which a step-wise schedule falls: to half or less at once, after a stretch that was flat.

    The last steps of a linear or cosine schedule halve as well, but are not flat before.
    """

    def falls(k: int) -> bool:
        flat = abs(curve[k - 1] - curve[k - 2]) < 1e-6 * curve[k - 1]
        return flat and curve[k] <= 0.5 * curve[k - 1]

    return [k for k in range(2, len(curve)) if falls(k)]


def _paper_step(letter: str, run: Run) -> int:
    """I and D of arXiv 2508.08625: ``I = 0.54 d1``, ``D = d1 + 2/3 (d2 - d1)`` with the first and the last LR drop;
    40 % and 80 % of the run where the LR has fewer than two drops, or is unknown."""
    share = {"I": 0.4, "D": 0.8}[letter]
    drops = lr_drops(run.curve) if run.curve is not None else []
    if run.curve is None:
        logger.warning(
            "boundary %s: the learning rate is not known before the run, so that its drops are not either; taken as "
            "%.0f %% of the run. Write it in %% or steps to choose it yourself.",
            letter, 100 * share,
        )  # fmt: skip
    elif len(drops) < 2:
        logger.info(
            "boundary %s: the learning rate has %d drops, not two; taken as a share of the run", letter, len(drops)
        )
    if len(drops) < 2:
        return int(share * run.max_steps + 0.5)
    first, last = drops[0], drops[-1]
    return int(0.54 * first + 0.5) if letter == "I" else int(first + 2 / 3 * (last - first) + 0.5)
