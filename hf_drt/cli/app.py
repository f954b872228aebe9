"""The app: one line per command."""

import typer

from hf_drt.cli.errors import reported
from hf_drt.cli.report import report

app = typer.Typer(
    name="hf-drt",
    help="Dynamic-rank training: what runs did.",
    callback=lambda: None,  # a command is named, even where there is but one
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help, that reads the same when piped
    pretty_exceptions_enable=False,
)
app.command("report")(reported(report))
