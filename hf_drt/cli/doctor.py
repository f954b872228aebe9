"""``hf-drt doctor``: what holds on this machine."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from hf_drt import __version__
from hf_drt.cli.output import in_terminal, print_json
from hf_drt.doctor import CHECKS, Bench, Report, Result, chosen, device_named, examine
from hf_drt.tables import plain_table

_COLOURS = {Result.HELD: "green", Result.FAILED: "bold red", Result.NOT_TRIED: "yellow"}
_NAMES = f"{CHECKS.described()}. May be repeated."


def doctor(
    only: Annotated[list[str] | None, Option(metavar="CHECK", help=f"Make this check alone: {_NAMES}")] = None,
    left_out: Annotated[
        list[str] | None, Option("--except", metavar="CHECK", help="Leave this check out. May be repeated.")
    ] = None,
    device: Annotated[
        str | None, Option(help="What computes, e.g. cpu, cuda or cuda:1; by default the accelerator, if there is one.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Smaller sizes, and without the compiler: some seconds.")] = False,
    json: Annotated[bool, Option("--json", help="JSON in place of tables, for a report of a fault.")] = False,
) -> None:
    """What holds on this machine, each thing compared with an independent computation, and what was not tried.

    The exit code is 1 if something did not hold. The report names neither users nor machines nor paths.
    """
    bench = Bench(_given(device_named, device, hint="--device"), quick)
    names = _given(chosen, only or (), left_out or (), hint="--only / --except")
    if json:
        reports = [examine(name, bench) for name in names]
        print_json(_as_json(bench, reports))
    else:
        reports = list(_shown(names, bench))
        _print_summary(reports)
    if any(report.count(Result.FAILED) for report in reports):
        raise typer.Exit(1)


def _given(function: Any, *arguments: Any, hint: str) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _shown(names: Sequence[str], bench: Bench) -> Iterator[Report]:
    """Each check's table as soon as it is there: what comes after may end the process."""
    typer.echo(f"hf_drt {__version__}, Python {platform.python_version()}, {_system()}; on {bench.device}")
    for name in names:
        with _waiting(f"{name}: {CHECKS[name].help}"):
            report = examine(name, bench)
        typer.echo(f"\n{name}: {CHECKS[name].help} ({report.seconds:.1f} s)")
        _print(report)
        yield report


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """A line on standard error while something takes time, in a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _print(report: Report) -> None:
    columns = ("what", "result", "seen")
    if not in_terminal():
        rows = [(f.what, f.result.value, f.seen) for f in report.findings]
        typer.echo(plain_table(columns, rows, left=3))
        return
    table = Table(*columns)
    for finding in report.findings:
        table.add_row(Text(finding.what), Text(finding.result.value, _COLOURS[finding.result]), Text(finding.seen))
    Console().print(table)


def _print_summary(reports: Sequence[Report]) -> None:
    counts = ", ".join(f"{sum(r.count(result) for r in reports)} {result.value}" for result in Result)
    typer.echo(f"\n{counts}; {sum(report.seconds for report in reports):.0f} s")
    for report in reports:
        for finding in report.findings:
            if finding.result is Result.FAILED:
                typer.echo(f"failed: {report.name}: {finding.what}: {finding.seen}")


def _as_json(bench: Bench, reports: Sequence[Report]) -> dict[str, Any]:
    checks = [
        {
            "check": report.name,
            "seconds": round(report.seconds, 2),
            "findings": [
                {"what": f.what, "result": f.result.value, "seen": f.seen, "values": dict(f.values)}
                for f in report.findings
            ],
        }
        for report in reports
    ]
    counts = {result.value: sum(report.count(result) for report in reports) for result in Result}
    return {
        "hf_drt": __version__, "python": platform.python_version(), "system": _system(), "device": str(bench.device),
        "quick": bench.quick, "counts": counts, "checks": checks,
    }  # fmt: skip
