"""``hf-drt export``: a checkpoint as a dense or a native model, a PEFT one, or one in linear pairs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn
from typer import Option

from hf_drt.cli.folders import copy_beside, refuse_full
from hf_drt.cli.output import progress
from hf_drt.cli.source import load, local_folder, read_config
from hf_drt.ema import AVERAGE_NAME, read_average
from hf_drt.export import RANKS, save_export
from hf_drt.forms import Adapter
from hf_drt.inspect import read_checkpoint
from hf_drt.messages import some
from hf_drt.registry import EXPORTERS


def export(
    source: Annotated[str, typer.Argument(help="A checkpoint-N of a run, or the folder of a model in any form.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    format: Annotated[str, Option(help=f"One of {EXPORTERS.described()}.")] = "dense",
    task: Annotated[str | None, Option(help="E.g. causal-lm; by default what the configuration says.")] = None,
    average: Annotated[bool, Option("--average", help="The average of the weights, of EMACallback; dense.")] = False,
) -> None:
    """Write a checkpoint as a dense model, a native one, a PEFT adapter with its base, or linear pairs.

    Tokenizer and processor files are copied along.
    """
    if format not in EXPORTERS:
        raise typer.BadParameter(f"must be one of {', '.join(EXPORTERS)}, got '{format}'.", param_hint="--format")
    if average and format != "dense":
        raise typer.BadParameter(f"an average is dense, got --format {format}.", param_hint="--average")
    folder = local_folder(source)
    refuse_full(target)
    if folder.is_dir() and RANKS in vars(read_config(str(folder))):
        raise ValueError(
            f"{source} is in linear pairs, of which no other form is made. Export the checkpoint that it was made of."
        )
    found = read_checkpoint(folder)
    forms = [*(layer.form for layer in found.layers), *found.fused.values()]
    if format == "adapter" and not any(isinstance(form, Adapter) for form in forms):
        raise ValueError(
            f"{source} has no layer in adapter form, so it cannot be a PEFT adapter. Export it as dense or native."
        )
    averages: dict[str, Tensor] = read_average(folder)["averages"] if average else {}
    with progress("export", 3) as tick:
        model: Any = load(folder, task)
        tick()

        def save(where: str, state: dict[str, Tensor] | None) -> None:
            _take(model, averages)
            model.save_pretrained(where, state_dict=state)

        written = save_export(model, str(target), format, save)
        tick()
        copy_beside(folder, target)
        tick()
    what = "the average of its weights" if average else found.kind
    typer.echo(f"{source}: {what}, written to {target} as {written}")


def _take(model: nn.Module, averages: dict[str, Tensor]) -> None:
    """Put averages into a model that is presented as a dense one.

    Raises:
        ValueError: They are of another model.
    """
    if foreign := model.load_state_dict(averages, strict=False).unexpected_keys:
        raise ValueError(f"{AVERAGE_NAME} is of another model: it has {some(foreign)}, which the model lacks.")
