"""The command ``hf-drt``: one line per command, whose module is imported once the command is called."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

# Of every command, whose function has its name in the module of its name, the line in the list of all.
COMMANDS = {
    "plan": "What a run will cost, phase by phase, without weights.",
    "report": "What one or several runs did, as one HTML page.",
    "inspect": "What is in a checkpoint: forms, ranks and spectra.",
    "export": "Write a checkpoint as a dense, native or PEFT model.",
    "compress": "Make a trained model smaller, calibrated on texts.",
    "compare": "How two checkpoints differ: logits and weights.",
    "doctor": "What holds on this machine, and what does not.",
}
_PLAIN = {
    "rich_markup_mode": None,  # plain help, that reads the same when piped
    "pretty_exceptions_enable": False,
}


class _OnDemand(TyperGroup):
    """Lists commands by what stands for them, and runs the real ones."""

    def resolve_command(self, *args: Any, **kwargs: Any) -> Any:
        name, command, rest = super().resolve_command(*args, **kwargs)
        return name, command if name is None else loaded(name), rest


def loaded(name: str) -> Any:
    """The command itself, from its module."""
    from hf_drt.cli.errors import reported

    function = getattr(import_module(f"hf_drt.cli.{name}"), name)
    getattr(function, "renew_options", lambda: None)()
    alone = typer.Typer(add_completion=False, **_PLAIN)
    alone.command(name)(reported(function))
    return get_command(alone)


def _named(name: str, line: str) -> None:
    @app.command(name, help=line)
    def listed() -> None:
        """Never called: :class:`_OnDemand` puts the real command in its place."""


app = typer.Typer(
    name="hf-drt",
    cls=_OnDemand,
    help="Dynamic-rank training: what a run will cost, what it did, and what is in a checkpoint.",
    no_args_is_help=True,
    **_PLAIN,
)
for _name, _line in COMMANDS.items():
    _named(_name, _line)
