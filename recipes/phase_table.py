"""The summary at the end of a recipe: one row per phase, read from the trainer's log history."""

from typing import Any

from rich.console import Console
from rich.table import Table


def phase_rows(trainer: Any, metric: str) -> list[dict[str, Any]]:
    """One dict per phase: what the trainer logged under it. A resumed run's rows of one phase are merged."""
    plan = trainer.drt.plan
    rows: list[dict[str, Any]] = [{"form": phase.kind} for phase in plan.phases]
    for entry in trainer.state.log_history:
        # An entry of step k stands at the end of the first k updates: the phase of update k - 1, but for a switch.
        index = entry.get("drt_phase", plan.index_at(max(entry["step"] - 1, 0)))
        rows[index] |= {key: value for key, value in entry.items() if key.startswith("drt_") or key == metric}
    return rows


def print_phase_table(trainer: Any, metric: str = "eval_loss") -> None:
    """Print phase, form, steps, trainable parameters, seconds, throughput, ``metric`` and effective rank."""
    table = Table(title=f"{trainer.drt.plan}  (of {trainer.drt.plan.max_steps} update steps)", title_justify="left")
    speed = "drt_tokens_per_second"
    if not any(speed in row for row in phase_rows(trainer, metric)):
        speed = "drt_samples_per_second"
    columns = {
        "form": ("form", "{}"),
        "steps": ("drt_phase_steps", "{}"),
        "trainable": ("drt_trainable_parameters", "{:,}"),
        "seconds": ("drt_phase_seconds", "{:.1f}"),
        "tokens/s" if "tokens" in speed else "samples/s": (speed, "{:,.0f}"),
        "peak MiB": ("drt_peak_memory_mib", "{:,.0f}"),
        metric.replace("_", " "): (metric, "{:.4f}"),
        "eff. rank": ("drt_effective_rank_mean", "{:.1f}"),
    }
    table.add_column("phase", justify="right")
    for title in columns:
        table.add_column(title, justify="left" if title == "form" else "right")
    for index, row in enumerate(phase_rows(trainer, metric)):
        cells = (pattern.format(row[key]) if key in row else "-" for key, pattern in columns.values())
        table.add_row(str(index), *cells)
    Console(width=max(Console().width, 110)).print(table)
    cost = trainer.drt.cost()
    print(
        f"The {len(trainer.drt.targets)} target layers took {cost.flops:.2f} of their dense training FLOPs, "
        f"with {cost.parameters:.2f} of their trainable parameters on average."
    )
