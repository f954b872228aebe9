"""The command ``hf-drt``: one line per command."""

import typer

from hf_drt.cli.compare import compare
from hf_drt.cli.errors import reported
from hf_drt.cli.export import export
from hf_drt.cli.inspect import inspect
from hf_drt.cli.plan import plan
from hf_drt.cli.report import report

app = typer.Typer(
    name="hf-drt",
    help="Dynamic-rank training: what a run will cost, what it did, and what is in a checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help, that reads the same when piped
    pretty_exceptions_enable=False,
)
app.command("plan")(reported(plan))
app.command("report")(reported(report))
app.command("inspect")(reported(inspect))
app.command("export")(reported(export))
app.command("compare")(reported(compare))
