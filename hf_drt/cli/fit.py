"""``hf-drt plan --max-memory``: which plan fits, and what was tried on the way."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import typer
from torch import nn

from hf_drt.cli.output import mib, progress
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.planning import ResolvedPlan, TargetLayers, group_counts
from hf_drt.simulate import RATIOS, Candidate, Space, StepCosts, Trial, fitting
from hf_drt.tables import print_table

_UNITS = {"": 2**20, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")

Peak = Callable[[Candidate], int]


def parse_bytes(text: str) -> int:
    """``24GiB``, ``24GB`` or ``24000`` (MiB) as bytes.

    Raises:
        ValueError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"'{text}' is not a size above 0; write e.g. 24GiB, 24GB, 900MiB, or a number of MiB.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Fitted:
    """What is proposed for a limit of so many bytes, and what was tried."""

    limit: int
    trials: list[Trial]
    found: Candidate

    def print(self) -> None:
        """As a table."""
        rows = [[str(trial.candidate), mib(trial.peak), "yes" if trial.fits else "no"] for trial in self.trials]
        typer.echo(f"what fits into {mib(self.limit)} MiB of tensors:\n")
        print_table(["settings", "peak MiB", "fits"], rows, left=1)
        typer.echo(f"\nproposal: {self.found}\n")

    def as_json(self) -> dict[str, Any]:
        """The same as JSON; memory in bytes."""
        tried = [{**_told(trial.candidate), "peak": trial.peak, "fits": trial.fits} for trial in self.trials]
        return {"limit": self.limit, "tried": tried, "proposal": _told(self.found)}


def _told(candidate: Candidate) -> dict[str, Any]:
    return {**candidate.settings, "checkpointing": candidate.checkpointing}


PROBE = {"schedule": "rotate(groups=2)", "rank_ratio": 1 / 8, "frozen_dtype": "bfloat16"}
"""Settings of a rotation, as they are tried."""


def space_of(model: nn.Module, config: DRTConfig, idle: Collection[str], ratio: float | None) -> Space:
    """What can be tried beside what was asked for.

    Args:
        model: The model.
        config: The settings given, with those of :data:`PROBE`.
        idle: Names of those that have no effect on this model.
        ratio: Rank of the layers that wait as a share of min(out, in), where it is given.
    """
    ratios = RATIOS if ratio is None else (ratio,)
    return Space(
        group_counts(TargetLayers.of(model, config).shapes, config),
        (None,) if "rank_ratio" in idle else ratios,
        "frozen_dtype" not in idle,
        not config.dense_checkpointing and config.recompute == "none",
    )


def fitted(limit: int, asked: Candidate, space: Space, peak: Peak) -> Fitted:
    """What is proposed.

    Raises:
        ValueError: Nothing fits; the message has the smallest that was found.
    """
    trials, found = fitting(limit, asked, space, peak)
    if found is None:
        least = min(trials, key=lambda trial: trial.peak)
        raise ValueError(
            f"nothing that was tried fits into {mib(limit)} MiB: the least is {mib(least.peak)} MiB, with "
            f"{least.candidate}. Take a smaller batch (--batch-size, --seq-length), an optimizer with a smaller state "
            "(--optimizer, --matrix-optimizer), --dtype bfloat16, or a smaller rank (--rank-ratio)."
        )
    return Fitted(limit, trials, found)


def largest_phase(title: str, resolved: ResolvedPlan, model: Any, batch: Any, how: dict[str, Any], limit: int) -> int:
    """Bytes of the largest phase; where one is above the limit already, of that one. The first turn of full rank and
    the last are looked at first, since most often they are the largest. In a terminal a bar has the title."""
    controller = DynamicRank(model, resolved.config, plan=resolved, in_trainer=True)
    count, largest = len(resolved.plan), 0
    order = dict.fromkeys(index for index in (1, count - 1, *range(count)) if index < count)
    with StepCosts(controller, batch, **how) as costs, progress(title, count) as tick:
        for index in order:
            largest = max(largest, costs.of(index).peak)
            tick()
            if largest > limit:
                break
    return largest
