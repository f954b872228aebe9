"""Errors of a command as one message and an exit code: 2 for a wrong command line, 1 for all that cannot be done."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from transformers.utils import logging as transformers_logging


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the errors that a user can mend told in their own words and without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _quiet():
                command(*args, **kwargs)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            typer.echo(f"hf-drt: error: {error or type(error).__name__}", err=True)
            raise typer.Exit(1) from None

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages of libraries: what hf_drt would warn of is in the output."""
    own = logging.getLogger("hf_drt")
    level, theirs = own.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    own.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        own.setLevel(level)
        transformers_logging.set_verbosity(theirs)
        if bars:
            transformers_logging.enable_progress_bar()
