"""A run as numbers: curves, phases, switches and effective ranks, from what its Trainer has logged."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from hf_drt.report.clock import Clock, Rows, read_clock
from hf_drt.report.run_files import RunError, RunFiles, read_files
from hf_drt.schedule import FormSpan, Phase, Plan, Run, Schedule, spans, with_dtype

LAYER_PREFIX = "drt_effective_rank/"
_NO_METRIC = ("epoch", "step", "total_flos", "num_input_tokens_seen", "num_tokens", "train_")
_NO_METRIC_ENDS = ("_runtime", "_per_second", "_model_preparation_time")


class Point(NamedTuple):
    """A logged value; ``seconds`` is None where the time is unknown."""

    step: int
    seconds: float | None
    value: float


Series = tuple[Point, ...]


@dataclass(frozen=True)
class PhaseData:
    """One phase that has begun. What was not logged is None.

    Attributes:
        index, kind, rank: Place in the plan; form, and its rank where the plan names one. No kind without a plan.
        start, end: Update steps ``[start, end)``; the end is where the run stands, if it stands within.
        begin, finish: Seconds of training at both, after and before the switches.
        steps, seconds: That were made, and that they took.
        tokens_per_second, samples_per_second: Throughput over all processes.
        peak_memory: MiB.
        trainable: Parameters of the whole model.
        ranks: Lowest and highest rank of a target layer in low-rank form.
        effective_rank: Mean over the target layers, last measured.
        parts: Where groups of layers change form, which, and into what.
        dtype: That the phase computes in, where the plan names one.
    """

    index: int
    kind: str | None
    rank: int | float | None
    start: int
    end: int
    begin: float | None
    finish: float | None
    steps: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    peak_memory: float | None = None
    trainable: int | None = None
    ranks: tuple[int, int] | None = None
    effective_rank: float | None = None
    parts: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def label(self) -> str:
        """``factored``, ``factored:64/bf16``, ``dense[2/8]`` of groups, or ``phase 0`` where the form is unknown."""
        form = self.parts[0] if self.parts else self.kind or f"phase {self.index}"
        return with_dtype(form if self.parts or self.rank is None else f"{form}:{self.rank}", self.dtype)

    @property
    def numbered(self) -> str:
        """The label with the phase's place in the plan: ``1 dense``."""
        return f"{self.index} {self.label}" if self.kind else self.label


@dataclass(frozen=True)
class SwitchData:
    """A change of form before update ``step``: into which phase, what it took, and what it cost."""

    step: int
    phase: int
    seconds: float | None
    truncation_error: float | None
    merge_error: float | None
    function_error: float | None


@dataclass(frozen=True)
class RankMap:
    """Effective rank, ``values[layer][time]``, of every target layer at some update steps; None where not measured."""

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    seconds: tuple[float | None, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: Shortest end of its path that no other run shares.
        step, max_steps: Where it stands, and where it ends.
        plan: The resolved schedule; None for a plain run, or where no checkpoint tells.
        planned: Phases in the plan, also those that have not begun.
        clock: Time of its steps.
        series: Curves by name, among them ``loss``, ``learning_rate``, ``eval_*``.
        totals: Last value of every number that describes the run as a whole.
        groups: Forms over time of each group of layers, by its name; of a plan without groups none.
    """

    name: str
    folder: Path
    step: int
    max_steps: int
    plan: str | None
    planned: int
    clock: Clock
    phases: tuple[PhaseData, ...] = ()
    switches: tuple[SwitchData, ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    ranks: RankMap | None = None
    totals: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[FormSpan]] = field(default_factory=dict)

    @property
    def dynamic(self) -> bool:
        """Whether it was trained by this package, which measures it, be it dense throughout."""
        return bool(self.phases)

    @property
    def changes(self) -> bool:
        """Whether it has phases to tell apart: a run that is dense from its beginning to its end has none."""
        return any(phase.kind != "dense" for phase in self.phases) or self.planned > 1


def read_runs(folders: Sequence[str | os.PathLike]) -> list[RunData]:
    """Read runs to be shown beside one another.

    Args:
        folders: Output directories of Trainers, or checkpoints in them.

    Raises:
        RunError: One is no run, or is given twice; a file is damaged or of a newer format; a plan cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise RunError("no run was given. Give at least one RUN_DIR, a Trainer's output_dir.")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise RunError(f"{paths[index]} is given twice. Give every run once.")
    files = [read_files(path) for path in paths]
    return [_read_run(name, each) for name, each in zip(distinct_names(resolved), files, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others; a checkpoint comes with the name of its run."""
    depths = [2 if folder.name.startswith("checkpoint-") else 1 for folder in folders]
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder, depth in zip(folders, depths, strict=True)]
        twins = [names.count(name) > 1 for name in names]
        if not any(twins):
            return names
        depths = [depth + twin for depth, twin in zip(depths, twins, strict=True)]


def _read_run(name: str, files: RunFiles) -> RunData:
    log = files.log
    rows = [_numbers(row) for row in log["log_history"]]
    if not rows:
        raise RunError(f"{files.log_path} has no logged rows: nothing to show. Train with logging_steps set.")
    rows += _in_progress(rows, files.state)
    switches = _switches(rows)
    plan = _grown(_read_plan(files), switches, files)
    clock = read_clock(rows)
    last = log["global_step"]
    max_steps = plan.max_steps if plan else max(log.get("max_steps") or 0, last)
    _check_plan(plan, switches, files)
    phases = _phases(rows, plan, switches, clock, last)
    return RunData(
        name=name,
        folder=files.folder,
        step=last,
        max_steps=max_steps,
        plan=str(plan) if plan else None,
        planned=len(plan) if plan else len(phases),
        clock=clock,
        phases=phases,
        switches=switches,
        series=_curves(rows, clock),
        ranks=_rank_map(rows, clock, (files.state or {}).get("layers", ())),
        groups=_groups(plan) if plan else {},
        totals={k: v for row in rows for k, v in row.items() if k.startswith(("drt_plan_", "train_", "total_flos"))},
    )


def _groups(plan: Plan) -> dict[str, list[FormSpan]]:
    rows = spans(plan)
    return rows if len(rows) > 1 else {}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _read_plan(files: RunFiles) -> Plan | None:
    if files.state is None:
        return None
    plan, max_steps = files.state.get("plan"), files.state.get("max_steps")
    try:
        if not isinstance(plan, str) or not isinstance(max_steps, int):
            raise ValueError("it needs a text under 'plan' and a whole number under 'max_steps'")
        return Schedule.parse(plan).resolve(Run(max_steps))
    except ValueError as error:
        raise RunError(
            f"the plan {plan!r} (of {max_steps!r} steps) in {files.state_folder} cannot be read: {error}"
        ) from None


def _grown(plan: Plan | None, switches: tuple[SwitchData, ...], files: RunFiles) -> Plan | None:
    """A trigger's plan ends with its checkpoint: windows that began later, every second phase, are in the log alone."""
    if plan is None or files.state is None or "windows" not in files.state:
        return plan
    later = [switch for switch in switches if switch.phase >= len(plan)]
    low = plan.phases[0]
    phases = [Phase(s.step, "dense", dtype=low.dtype) if s.phase % 2 else replace(low, start=s.step) for s in later]
    try:
        return Plan((*plan.phases, *phases), plan.max_steps)
    except ValueError:
        return plan  # of another run


def _check_plan(plan: Plan | None, switches: tuple[SwitchData, ...], files: RunFiles) -> None:
    """A folder that was trained in twice holds files of two runs."""
    if plan is None:
        return
    for switch in switches:
        if switch.phase >= len(plan) or plan.phases[switch.phase].start != switch.step:
            raise RunError(
                f"{files.log_path} and {files.state_folder} are of different runs: by the first, phase {switch.phase} "
                f"began at step {switch.step}; the second's plan is '{plan}'. Give a checkpoint-N as RUN_DIR, or "
                "delete those of the other run."
            )


def _switches(rows: Rows) -> tuple[SwitchData, ...]:
    return tuple(
        SwitchData(
            row["step"],
            row["drt_phase"],
            row["drt_switch_seconds"],
            row.get("drt_truncation_error"),
            row.get("drt_merge_error"),
            row.get("drt_function_error"),
        )
        for row in rows
        if "drt_phase" in row and "drt_switch_seconds" in row
    )


def _phases(
    rows: Rows, plan: Plan | None, switches: tuple[SwitchData, ...], clock: Clock, last: int
) -> tuple[PhaseData, ...]:
    """The phases that have begun, with what was logged in each."""
    starts = [switch.step for switch in switches]
    found = []
    for position, switch in enumerate(switches):
        start, end = switch.step, min([*starts[position + 1 :], last])
        entry = plan.phases[switch.phase] if plan else None
        own = _rows_of(rows, switch.phase, start, end)
        found.append(
            PhaseData(
                index=switch.phase,
                kind=entry.kind if entry else None,
                rank=entry.rank if entry else None,
                start=start,
                end=end,
                begin=clock.after_switch(start),
                finish=clock.at(end),
                steps=_whole(own.get("drt_phase_steps")),
                seconds=own.get("drt_phase_seconds"),
                tokens_per_second=own.get("drt_tokens_per_second"),
                samples_per_second=own.get("drt_samples_per_second"),
                peak_memory=own.get("drt_peak_memory_mib"),
                trainable=_whole(own.get("drt_trainable_parameters")),
                ranks=(int(own["drt_rank_min"]), int(own["drt_rank_max"])) if "drt_rank_max" in own else None,
                effective_rank=own.get("drt_effective_rank_mean"),
                parts=tuple(map(str, entry.parts)) if entry else (),
                dtype=entry.dtype if entry else None,
            )
        )
    return tuple(found)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _rows_of(rows: Rows, phase: int, start: int, end: int) -> dict[str, float]:
    """All that was logged in a phase, the last value of each. A row of step k stands at the end of update k - 1."""
    merged: dict[str, float] = {}
    for row in rows:
        if row["drt_phase"] == phase if "drt_phase" in row else start < row["step"] <= end:
            merged |= row
    return merged


def _in_progress(rows: Rows, state: dict[str, Any] | None) -> Rows:
    """The row that the phase in progress would end with, from the last checkpoint's meter; none if it has ended."""
    meter = state.get("meter") if state else None
    if state is None or not isinstance(meter, dict) or state.get("step", 0) < rows[-1]["step"]:
        return []
    if any("drt_phase_seconds" in row and row.get("drt_phase") == meter.get("phase") for row in rows):
        return []
    row = {"drt_phase": meter.get("phase"), "drt_phase_steps": meter.get("steps"), "step": state["step"]}
    row |= {"drt_phase_seconds": meter.get("seconds"), "drt_peak_memory_mib": meter.get("peak_memory")}
    if "earlier" in meter:
        row["drt_seconds"] = meter["earlier"] + meter["seconds"]
    for name in ("samples", "tokens"):
        if meter.get(name) and meter.get("seconds"):
            row[f"drt_{name}_per_second"] = meter[name] / meter["seconds"]
    return [_numbers(row)]


def _curves(rows: Rows, clock: Clock) -> dict[str, Series]:
    curves: dict[str, list[Point]] = {}
    for row in rows:
        for key, value in row.items():
            if is_metric(key):
                curves.setdefault(key, []).append(Point(row["step"], clock.at(row["step"]), value))
    return {key: tuple(points) for key, points in curves.items()}


def is_metric(key: str) -> bool:
    """Whether a key of the log is a curve over the run: no setting, no time, nothing of a phase or a layer."""
    if key.startswith("drt_"):
        return key in ("drt_effective_rank_mean", "drt_effective_rank_min")
    return not key.startswith(_NO_METRIC) and not key.endswith(_NO_METRIC_ENDS)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """For sorting: numbers in a name by their size."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _rank_map(rows: Rows, clock: Clock, order: Iterable[str]) -> RankMap | None:
    """``order`` are the layers as in the model; the log has them sorted as text, the tenth before the second."""
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        ranks = {k.removeprefix(LAYER_PREFIX): v for k, v in row.items() if k.startswith(LAYER_PREFIX)}
        if ranks:
            by_step[row["step"]] = ranks
    if not by_step:
        return None
    found = {name for ranks in by_step.values() for name in ranks}
    layers = (*(name for name in order if name in found), *sorted(found.difference(order), key=_natural))
    return RankMap(
        layers,
        tuple(by_step),
        tuple(clock.at(step) for step in by_step),
        tuple(tuple(ranks.get(name) for ranks in by_step.values()) for name in layers),
    )


def common_prefix(names: Sequence[str]) -> str:
    """What all dotted names begin with, up to a dot; nothing if there is one name."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = list(takewhile(lambda column: len(set(column)) == 1, parts))
    return "".join(f"{column[0]}." for column in common) if len(names) > 1 else ""
