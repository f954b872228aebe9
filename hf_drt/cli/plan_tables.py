"""What ``hf-drt plan`` prints."""

from collections.abc import Sequence
from typing import Any

import typer

from hf_drt.cli.measurement import PhaseTime
from hf_drt.cli.output import duration, in_terminal, mib
from hf_drt.forms import Dense, form_to_dict
from hf_drt.planning import ResolvedPlan, facts
from hf_drt.schedule import BLOCKS, LETTERS, Plan, Span, spans, timelines
from hf_drt.simulate import Proposal, RunEstimate, StepCost
from hf_drt.tables import print_table


def rows_of(run: RunEstimate, plan: Plan) -> dict[str, Sequence[Span]]:
    """What a timeline shows: the phases, or the forms of each group."""
    rows = spans(plan)
    return {**rows} if len(rows) > 1 else {"": run.phases}


def print_estimate(
    title: str,
    run: RunEstimate,
    resolved: ResolvedPlan,
    proposal: Proposal | None,
    times: tuple[PhaseTime, ...] | None,
    layers: bool,
) -> None:
    """Print a plan's timeline, the table of its phases, totals and warnings.

    Args:
        title: Model and load.
        run: The estimate.
        resolved: What has been estimated.
        proposal: What the budget has led to, if one was given.
        times: Of real steps, if they were measured.
        layers: Whether to add a table of all target layers.
    """
    typer.echo(f"{title}; {run.dense.parameters:,} parameters, {len(run.layers)} target layers\n")
    typer.echo(timelines(rows_of(run, resolved.plan), marks=BLOCKS if in_terminal() else LETTERS) + "\n")
    typer.echo("\n".join(facts(resolved)) + "\n")
    print_table(*_phase_table(run, times), left=2)
    extra = mib(run.switch_extra)
    typer.echo(f"\nmemory in MiB, of tensors; a switch may need up to {extra} MiB more than the larger of its phases")
    typer.echo(
        f"the run: {run.flops:.4g} FLOPs, {run.share:.3f} of dense training of the whole model; trainable parameters "
        f"{run.trainable:.3f} of the whole model's on average"
    )
    typer.echo(_peaks(run))
    if resolved.config.uses_matrix_optimizer:
        typer.echo(_update_line(run))
    if times is not None:
        total, steps, switches = _length(run, times)
        typer.echo(
            f"predicted length: {duration(total)} (steps {duration(steps)}, switches {duration(switches)}; without "
            "evaluation and saving)"
        )
    if proposal is not None:
        typer.echo(f"proposal: --schedule '{proposal.plan}' --rank-ratio {proposal.rank_ratio:g} --steps {run.steps}")
    for warning in run.warnings:
        typer.echo(f"warning: {warning}")
    if layers:
        typer.echo("")
        print_table(*_layer_table(run))


def _peaks(run: RunEstimate) -> str:
    """The largest memory of all phases, and where it is met."""
    largest = max(range(len(run.phases)), key=lambda index: run.phases[index].step.peak)
    fullest = max(range(len(run.phases)), key=lambda index: run.phases[index].step.held)
    return (
        f"peak {mib(run.peak)} MiB, {run.peak / run.dense.peak:.3f} of dense, in phase {largest}; of it weights, "
        f"gradients and optimizer state up to {mib(run.held)} MiB, {run.held / run.dense.held:.3f} of dense, in phase "
        f"{fullest}"
    )


def _update_line(run: RunEstimate) -> str:
    """What the matrix optimizer adds to the FLOPs of every phase."""
    shares = [f"{p.update_flops / p.step.flops:.1%} in phase {i} ({p.form})" for i, p in enumerate(run.phases)]
    return f"matrix_optimizer adds to an update step's FLOPs, which do not contain it: {', '.join(shares)}"


def _phase_table(run: RunEstimate, times: tuple[PhaseTime, ...] | None) -> tuple[list[str], list[list[str]]]:
    columns = ["phase", "form", "steps", "rank", "trainable", "GFLOPs/step", "FLOPs/dense", "weights", "gradients",
               "optimizer", "activations", "peak", "peak/dense"]  # fmt: skip
    columns += ["s/step", "switch s"] if times is not None else []
    rows = []
    for index, phase in enumerate(run.phases):
        rows.append(
            [f"{index}", phase.form, f"{phase.steps}", _ranks(phase.ranks), *_cost_cells(phase.step, run.dense)]
        )
        if times is not None:
            rows[-1] += [f"{times[index].seconds:.3f}", f"{times[index].switch:.2f}"]
    rows.append(["-", "dense run", f"{run.steps}", "full", *_cost_cells(run.dense, run.dense)])
    rows[-1] += ["-"] * (len(columns) - len(rows[-1]))
    return columns, rows


def _cost_cells(step: StepCost, dense: StepCost) -> list[str]:
    sizes = (step.weights, step.gradients, step.optimizer, step.activations, step.peak)
    return [
        f"{step.trainable:,}", f"{step.flops / 1e9:,.4g}", f"{step.flops / dense.flops:.3f}", *map(mib, sizes),
        f"{step.peak / dense.peak:.3f}",
    ]  # fmt: skip


def _ranks(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "full"
    return f"{ranks[0]}" if ranks[0] == ranks[1] else f"{ranks[0]}-{ranks[1]}"


def _layer_table(run: RunEstimate) -> tuple[list[str], list[list[str]]]:
    columns = ["layer", "out x in", "break-even", "vectors/step"]
    for index, phase in enumerate(run.phases):
        columns += [f"rank {index} ({phase.form})", "FLOPs/dense"]
    rows = []
    for layer in run.layers:
        rows.append([layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.break_even:.1f}", f"{layer.rows:,}"])
        for index, form in enumerate(layer.forms):
            rank = ("frozen" if form.frozen else "full") if isinstance(form, Dense) else f"{form.rank}"
            rows[-1] += [rank, f"{layer.share(index):.3f}"]
    return columns, rows


def _length(run: RunEstimate, times: tuple[PhaseTime, ...]) -> tuple[float, float, float]:
    """Seconds of the run, of its steps, and of its switches."""
    steps = sum(phase.steps * time.seconds for phase, time in zip(run.phases, times, strict=True))
    switches = sum(time.switch for time in times)
    return steps + switches, steps, switches


def as_json(
    run: RunEstimate, resolved: ResolvedPlan, proposal: Proposal | None, times: tuple[PhaseTime, ...] | None
) -> dict[str, Any]:
    """The same as JSON; memory in bytes."""

    def cost(step: StepCost) -> dict[str, int]:
        return {key: value for key, value in vars(step).items() if key != "rows"}

    phases: list[dict[str, Any]] = [
        {"form": p.form, "start": p.start, "end": p.end, "ranks": p.ranks, **cost(p.step),
         "update_flops": p.update_flops}
        for p in run.phases
    ]  # fmt: skip
    for phase, time in zip(phases, times or (), strict=False):
        phase |= {
            "seconds_per_step": time.seconds, "cpu_seconds_per_step": time.cpu_seconds,
            "switch_seconds": time.switch, "process_peak_mib": time.peak,
        }  # fmt: skip
    result = {
        "steps": run.steps, "flops": run.flops, "flops_share": run.share, "trainable_share": run.trainable,
        "peak": run.peak, "held": run.held, "switch_extra": run.switch_extra,
        "rank_ratio": resolved.config.rank_ratio, "phases": phases,
        "target_layers_flops_share": resolved.cost.flops, "plan": str(resolved.plan), "decided": facts(resolved),
        "dense": cost(run.dense), "warnings": list(run.warnings),
        "layers": [
            {"name": layer.name, "shape": layer.shape, "break_even": layer.break_even, "rows": layer.rows,
             "forms": [form_to_dict(form) for form in layer.forms]}
            for layer in run.layers
        ],
    }  # fmt: skip
    if times is not None:
        result |= dict(zip(("seconds", "step_seconds", "switch_seconds"), _length(run, times), strict=True))
    if proposal is not None:
        result["proposal"] = {
            "schedule": str(proposal.plan),
            "rank_ratio": proposal.rank_ratio,
            "share": proposal.share,
        }
    return result
