"""The summary at the end of a recipe: one row per phase, read from the trainer's log history."""

import shlex
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_drt import Dense, Form


def phase_rows(trainer: Any, metric: str) -> list[dict[str, Any]]:
    """One dict per phase: what the trainer logged under it. A resumed run's rows of one phase are merged."""
    plan = trainer.drt.plan
    forms = [trainer.drt.forms(index).values() for index in range(len(plan))]
    rows: list[dict[str, Any]] = [
        {"form": phase.kind, "rank": _rank(phase_forms)} for phase, phase_forms in zip(plan.phases, forms, strict=True)
    ]
    for entry in trainer.state.log_history:
        # An entry of step k stands at the end of the first k updates: the phase of update k - 1, but for a switch.
        index = entry.get("drt_phase", plan.index_at(max(entry["step"] - 1, 0)))
        rows[index] |= {key: value for key, value in entry.items() if key.startswith("drt_") or key == metric}
    return rows


def _rank(forms: Iterable[Form]) -> str:
    """Lowest and highest rank of the target layers in low-rank form."""
    ranks = sorted({form.rank for form in forms if not isinstance(form, Dense)})
    return "full" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def print_phase_table(trainer: Any, metric: str = "eval_loss") -> None:
    """Print phase, form, rank, steps, trainable parameters, seconds, throughput, ``metric`` and effective rank, what
    the target layers cost, and how to compare the run with a dense one."""
    table = Table(title=f"{trainer.drt.plan}  (of {trainer.drt.plan.max_steps} update steps)", title_justify="left")
    speed = "drt_tokens_per_second"
    if not any(speed in row for row in phase_rows(trainer, metric)):
        speed = "drt_samples_per_second"
    columns = {
        "form": ("form", "{}"),
        "rank": ("rank", "{}"),
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
    count = len(trainer.drt.targets)
    print(
        f"The {count} target layers took {cost.flops:.2f} of their dense training FLOPs, with {cost.parameters:.2f} of "
        f"their trainable parameters on average. eff. rank is the mean effective rank of their weights W (out, in)."
    )
    print(f"Compare with dense: {_dense_command(sys.argv, trainer.args.output_dir)}")


def _dense_command(argv: list[str], output_dir: str) -> str:
    """The run again, as plain training, and the report on both."""
    given, dropped = [], ("--drt_", "--output_dir")
    rest = iter(argv[1:])
    word = next(rest, None)
    while word is not None:
        follows = next(rest, None)
        if word.startswith(dropped):  # with its values
            while "=" not in word and follows is not None and not follows.startswith("--"):
                follows = next(rest, None)
        else:
            given.append(word)
        word = follows
    dense = f"{output_dir}-dense"
    run = [sys.executable, argv[0], *given, "--plain", "--output_dir", dense]
    return f"{shlex.join(run)} && hf-drt report {shlex.quote(output_dir)} {shlex.quote(dense)}"
