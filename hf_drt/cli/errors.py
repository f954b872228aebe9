"""Errors of a command as one message and an exit code: 2 for a wrong command line, 1 for all that cannot be done."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import typer
from transformers.utils import logging as transformers_logging


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the errors that a user can mend told in their own words and without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.getLogger("hf_drt").setLevel(logging.ERROR)  # what it would warn of is in the output
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            typer.echo(f"hf-drt: error: {error or type(error).__name__}", err=True)
            raise typer.Exit(1) from None

    return run
