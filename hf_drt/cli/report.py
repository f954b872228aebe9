"""``hf-drt report``: what runs did, on one page and in pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from hf_drt.report import read_runs, write_page


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="output_dir of a Trainer, or a checkpoint.")],
    output: Annotated[Path, Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    figures: Annotated[Path | None, Option(help="Folder to write pictures for papers to, as PNG and SVG.")] = None,
) -> None:
    """Loss, metrics, effective rank, cost and switches of one or several runs, as one HTML page without a network."""
    _check_targets(output, figures)
    draw = _figure_writer() if figures is not None else None
    data = read_runs(runs)
    page = write_page(data, output)
    typer.echo(f"wrote {page} ({page.stat().st_size / 1000:,.0f} kB); open it in any browser")
    if draw is not None:
        typer.echo(f"wrote {len(draw(data, figures))} pictures to {figures}")


def _check_targets(output: Path, figures: Path | None) -> None:
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name the HTML file, e.g. --output {output / 'report.html'}.")
    if output.exists() and not _looks_like_a_page(output):
        raise ValueError(
            f"--output {output} exists and is not an HTML page; it is not written over. Name another file."
        )
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ValueError(f"--figures {figures} is a file; name a folder for the pictures.")


def _looks_like_a_page(path: Path) -> bool:
    """Whether a file begins as ours do: a path mistyped must not cost a log or a model."""
    with path.open("rb") as file:
        return file.read(15).lower() in (b"", b"<!doctype html>")


def _figure_writer() -> Callable:
    try:
        from hf_drt.report import write_figures
    except ImportError as error:
        raise ImportError(f"--figures needs the package '{error.name}': pip install 'hf-drt[report]'.") from None
    return write_figures
