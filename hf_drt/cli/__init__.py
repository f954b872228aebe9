"""The command line ``hf-drt``. What the commands know lies in the modules below; here are arguments and printing."""

import sys


def main() -> None:
    """Entry point of ``hf-drt`` and of ``python -m hf_drt.cli``."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"hf-drt needs the package '{error.name}': pip install 'hf-drt[cli]'.")
    from hf_drt.cli.app import app

    app(prog_name="hf-drt")
