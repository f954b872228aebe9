"""Tables and progress bars: rich in a terminal, aligned plain text in a pipe."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Row = Sequence[str]


def in_terminal() -> bool:
    """Whether the output is read by a person, not by a program or a file."""
    return Console().is_terminal


def print_table(columns: Row, rows: Sequence[Row], left: int = 1) -> None:
    """Print a table, whose first ``left`` columns are text and the others numbers."""
    if in_terminal():
        table = Table()
        for index, title in enumerate(columns):
            table.add_column(title, justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table, markup=False)
    else:
        typer.echo(plain_table(columns, rows, left))


def plain_table(columns: Row, rows: Sequence[Row], left: int = 1) -> str:
    """Columns two blanks apart; a cell holds no blank at its ends, so that the columns stay where they are."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def print_json(value: Any) -> None:
    """Print a value as JSON, and nothing else."""
    typer.echo(json.dumps(value, indent=1))


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, in a terminal only; the block calls what it gets once per piece of work."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as ``12.3 s``, ``4 min 5 s`` or ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
