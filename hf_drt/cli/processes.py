"""``hf-drt plan --processes``: what a plan takes on many processes, asked for and printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from hf_drt.cli.output import duration, mib
from hf_drt.config import DRTConfig
from hf_drt.simulate import (
    KINDS,
    LAYOUTS,
    MACHINES,
    Layout,
    Machine,
    OnProcesses,
    PhaseOnProcesses,
    Switch,
    layout_for,
    machine_for,
)
from hf_drt.tables import print_table

ENGINE_HELP = f"How --processes hold the model: {', '.join(LAYOUTS)} (default ddp)."
LINKS_HELP = (
    f"Speeds of chips and links: {', '.join(MACHINES)} (default h100; data sheets), or a .toml or .json file of yours."
)


@dataclass(frozen=True)
class Wanted:
    """What the command line says of processes.

    Attributes:
        accumulation: Forward passes per update step; from the global batch where that is given.
    """

    layout: Layout
    machine: Machine
    accumulation: int


def wanted(
    processes: int | None,
    engine: str | None,
    shards: int | None,
    links: str | None,
    global_batch: int | None,
    *,
    batch_size: int,
    accumulation: int | None,
    dtype: str,
    bf16: bool,
    max_memory: str | None,
) -> Wanted | None:
    """What is asked for; None without ``--processes``.

    Raises:
        typer.BadParameter: A value is not allowed, or an option would have no effect.
    """
    if processes is None:
        alone = {"--engine": engine, "--shards": shards, "--links": links, "--global-batch": global_batch}
        for name, value in alone.items():
            if value is not None:
                raise _bad(name, "it has no effect without --processes. Add --processes, or leave it out.")
        return None
    if max_memory is not None:
        raise _bad("--max-memory", "it proposes a plan for one process. Leave out --processes, or --max-memory.")
    try:
        layout = layout_for(engine or "ddp", processes, bf16, shards)
        machine = machine_for(links or "h100")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--processes") from None
    if layout.makes_dtype and dtype != "float32":
        raise _bad("--dtype", f"{layout.name} makes the weights' dtype itself: take --bf16 in place of {dtype}.")
    if processes > machine.devices and processes % machine.devices:
        raise _bad(
            "--processes", f"{processes} do not fill nodes of {machine.devices}: take a multiple of {machine.devices}."
        )
    return Wanted(layout, machine, _accumulation(processes, batch_size, accumulation, global_batch))


def _accumulation(processes: int, batch_size: int, accumulation: int | None, global_batch: int | None) -> int:
    if global_batch is None:
        return accumulation or 1
    if accumulation is not None:
        raise _bad("--global-batch", "it and --accumulation both say how many forward passes there are. Give one.")
    together = processes * batch_size
    if global_batch % together or not global_batch:
        raise _bad(
            "--global-batch",
            f"{global_batch} samples do not divide among {processes} processes of {batch_size} samples each: take a "
            f"multiple of {together}, or another --batch-size.",
        )
    return global_batch // together


def check_settings(asked: Wanted, config: DRTConfig) -> None:
    """Whether the engine trains with these settings.

    Raises:
        typer.BadParameter: The matrix optimizer needs whole matrices; or phases have dtypes, and the engine its own.
    """
    if not asked.layout.whole_state and config.parsed is not None and any(config.parsed.dtypes):
        raise _bad(
            "--engine",
            f"{asked.layout.name} casts by a policy of its own, and phases of '{config.schedule}' have dtypes. Take "
            "--engine ddp, or --bf16 for the whole run.",
        )
    if config.uses_matrix_optimizer and not asked.layout.whole_state:
        raise _bad(
            "--engine",
            f"matrix_optimizer={config.matrix_optimizer} needs whole matrices, and {asked.layout.name} cuts them or "
            f"flattens them. Take --engine ddp, or --matrix-optimizer none.{config.without_matrix_optimizer}",
        )


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


# ---- tables


def print_processes(run: OnProcesses, plan_steps: Sequence[int]) -> None:
    """Print the tables.

    Args:
        plan_steps: Update steps of every phase.
    """
    layout, machine = run.layout, run.machine
    nodes = -(-layout.count // machine.devices)
    noun = "node" if nodes == 1 else "nodes"
    parts = f", {layout.shards} shards a replica" if layout.name == "hsdp" else ""
    typer.echo(f"\n{layout.count} processes, {layout.name}{parts}; {nodes} {noun} of {machine.devices} {machine.name}")
    typer.echo(f"speeds: {machine.origin} ({machine.source})\n")
    rows = [*enumerate(run.phases), ("-", run.dense)]
    print_table(*_memory_table(rows), left=2)
    typer.echo("\nmemory of a process in MiB, of tensors" + _too_large(run) + "\n")
    print_table(*_traffic_table(rows, run.dense), left=2)
    typer.echo(
        "\nMiB that a process sends in an update step, in rings; seconds of sending and of computing, one after the "
        f"other\nthe run: {_total(run, plan_steps)}\n"
    )
    print_table(*_switch_table(run), left=2)
    typer.echo("\nseconds of a switch by processes; layers: decomposed in all, and by the process that has most")


def _memory_table(rows: list[tuple[Any, PhaseOnProcesses]]) -> tuple[list[str], list[list[str]]]:
    columns = ["phase", "form", "weights", "gradients", "optimizer", "gathered", "sending", "activations", "peak"]
    return columns, [
        [f"{index}", p.form if index != "-" else "dense run", *map(mib, (
            p.held.weights, p.held.gradients, p.optimizer, p.held.gathered, p.held.sending, p.activations, p.peak,
        ))]
        for index, p in rows
    ]  # fmt: skip


def _traffic_table(
    rows: list[tuple[Any, PhaseOnProcesses]], dense: PhaseOnProcesses
) -> tuple[list[str], list[list[str]]]:
    kinds = [kind for kind in KINDS if any(p.sent[kind] for _, p in rows)]
    columns = ["phase", "form", *(kind.replace("_", "-") for kind in kinds), "sent", "sent/dense"]
    columns += ["sending s", "compute s", "sending/compute"]
    return columns, [
        [f"{index}", p.form if index != "-" else "dense run", *(mib(round(p.sent[kind])) for kind in kinds),
         mib(round(p.total)), f"{p.total / dense.total:.3f}", _seconds(p.communication), _seconds(p.compute),
         f"{p.ratio:.3f}"]
        for index, p in rows
    ]  # fmt: skip


def _switch_table(run: OnProcesses) -> tuple[list[str], list[list[str]]]:
    columns = ["into", "form", "processes", "layers", "by one", "decompose", "gather", "send", "merge", "total",
               "steps' worth"]  # fmt: skip
    rows = []
    for index, (phase, costs) in enumerate(zip(run.phases, run.switches, strict=True)):
        for s in costs:
            worth = s.seconds / max(phase.communication, phase.compute) if s.processes == run.layout.count else None
            cells = [_seconds(x) for x in (s.decompositions, s.gathers, s.broadcasts, s.merges, s.seconds)]
            rows.append([f"{index}", phase.form, f"{s.processes}", f"{s.decomposed}", f"{s.busiest}", *cells,
                         "-" if worth is None else f"{worth:.1f}"])  # fmt: skip
    return columns, rows


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _too_large(run: OnProcesses) -> str:
    memory = run.machine.memory
    if memory is None:
        return ""
    over = [f"{i}" for i, p in enumerate(run.phases) if p.peak > memory]
    told = f"too much in phase {', '.join(over)}" if over else "enough for all phases"
    return f"; each {run.machine.name} has {mib(memory)}, {told}"


def _total(run: OnProcesses, plan_steps: Sequence[int]) -> str:
    """What all update steps send and take, with dense training's beside it."""
    own = sum(n * p.total for n, p in zip(plan_steps, run.phases, strict=True))
    dense = sum(plan_steps) * run.dense.total
    most, least = (_length(run.phases, plan_steps, how) for how in (sum, max))
    dense_most, dense_least = (_length([run.dense], [sum(plan_steps)], how) for how in (sum, max))
    last = [costs[-1] for costs in run.switches]
    switches = sum(switch.seconds for switch in last)
    return (
        f"{own / dense:.3f} of dense training's bytes; steps {duration(least)} to {duration(most)} (sending hidden or "
        f"not), dense {duration(dense_least)} to {duration(dense_most)}; switches {duration(switches)}"
    )


def _length(phases: Sequence[PhaseOnProcesses], steps: Sequence[int], how: Any) -> float:
    return sum(n * how((p.communication, p.compute)) for n, p in zip(steps, phases, strict=True))


# ---- JSON


def processes_json(run: OnProcesses, accumulation: int) -> dict[str, Any]:
    """The same as JSON; memory and traffic in bytes."""
    machine, layout = run.machine, run.layout
    return {
        "count": layout.count, "engine": layout.name, "shards": layout.shards, "accumulation": accumulation,
        "machine": {"name": machine.name, "origin": machine.origin, "source": machine.source,
                    "devices": machine.devices},
        "phases": [_phase(p) for p in run.phases],
        "dense": _phase(run.dense),
        "switches": [[_switch(s) for s in costs] for costs in run.switches],
    }  # fmt: skip


def _phase(p: PhaseOnProcesses) -> dict[str, Any]:
    return {
        "form": p.form, **vars(p.held), "optimizer": p.optimizer, "activations": p.activations, "peak": p.peak,
        "sent": p.sent, "sent_total": p.total, "communication_seconds": p.communication, "compute_seconds": p.compute,
    }  # fmt: skip


def _switch(s: Switch) -> dict[str, Any]:
    return {**vars(s), "seconds": s.seconds}
