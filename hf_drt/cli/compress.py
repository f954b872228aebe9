"""``hf-drt compress``: a trained model made smaller, by calibration on texts."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from typer import Option

from hf_drt.cli.folders import copy_beside, refuse_full
from hf_drt.cli.output import print_json, progress
from hf_drt.cli.source import load, local_folder
from hf_drt.cli.texts import text_batches
from hf_drt.compress import ALLOCATIONS, Compression, LossCurve, loss_curve
from hf_drt.compress import compress as compressed
from hf_drt.export import save_export
from hf_drt.recovery import DTYPES, Recovery, compress_and_recover

FORMATS = ("native", "dense", "linear-pairs")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PICTURES = (".svg", ".png", ".pdf")
_ROWS = 2  # samples of a batch, which is an update of a recovery


def compress(
    source: Annotated[str, typer.Argument(help="Folder of a trained model, or a repository on the Hub.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    parameters: Annotated[
        float | None, Option(help="Share of the target layers' parameters to keep, between 0 and 1.")
    ] = None,
    energy: Annotated[float | None, Option(help="Or: share of each layer's squared norm to keep.")] = None,
    rank_ratio: Annotated[float | None, Option(help="Or: rank as a share of min(out, in).")] = None,
    rank: Annotated[int | None, Option(help="Or: the rank of all layers.")] = None,
    calibration: Annotated[
        str | None, Option(help="Texts like those the model is for: .txt, .jsonl with 'text', or a data set.")
    ] = None,
    evaluation: Annotated[str | None, Option(help="Other such texts: the loss on them, before and after.")] = None,
    samples: Annotated[int, Option(min=1, help="Of each of the two, at most.")] = 64,
    length: Annotated[int, Option(min=1, help="Tokens of a sample.")] = 512,
    allocation: Annotated[str | None, Option(help=f"How a budget is shared out: {', '.join(ALLOCATIONS)}.")] = None,
    sequential: Annotated[bool, Option("--sequential", help="Block by block, for want of memory.")] = False,
    recover_steps: Annotated[
        int | None,
        Option(min=0, help="Then fit the factors, and train them for so many updates, on more of the texts."),
    ] = None,
    recover_dtype: Annotated[
        str | None, Option(help=f"What that training computes in: {', '.join(DTYPES)}. Unset: {DTYPES[0]}.")
    ] = None,
    curve: Annotated[
        Path | None, Option(help="Picture to write, .svg, .png or .pdf: the loss at budgets from 0.9 to 0.4 besides.")
    ] = None,
    include: Annotated[list[str] | None, Option(help="Patterns of layers; several times for several.")] = None,
    exclude: Annotated[list[str] | None, Option(help="Patterns of layers that stay as they are.")] = None,
    format: Annotated[str, Option(help=f"What is written: {', '.join(FORMATS)}.")] = "native",
    task: Annotated[str | None, Option(help="E.g. causal-lm; by default what the configuration says.")] = None,
    json: Annotated[bool, Option("--json", help="JSON in place of tables.")] = False,
) -> None:
    """Make a trained model smaller: its layers as factors, by exactly one of --parameters, --energy, --rank-ratio and
    --rank.

    Tokenizer and processor files are copied along.
    """
    if format not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}, got '{format}'.", param_hint="--format")
    _check_recovery(recover_steps, recover_dtype, calibration)
    draw = None if curve is None else _drawing(curve, parameters, calibration)
    folder = local_folder(source)
    refuse_full(target)
    with progress("compress", 4 + (recover_steps or 0)) as tick:
        model: Any = load(folder, task)
        tick()
        sizes = (samples, length)
        batches = None if calibration is None else _batches(calibration, folder, model, *sizes)
        others = None if evaluation is None else _batches(evaluation, folder, model, *sizes)
        tick()
        found = None
        if draw is not None and parameters is not None and batches is not None:
            found = loss_curve(
                model, [*SHARES, parameters], batches, evaluation=others, include=include, exclude=exclude
            )
        made_smaller: Any = compressed
        if recover_steps is not None:
            options = {"dtype": recover_dtype or DTYPES[0], "progress": lambda done, steps: tick()}
            if recover_steps and (more := _beyond(str(calibration), folder, model, *sizes, recover_steps)):
                options["training"] = more
            made_smaller = partial(compress_and_recover, recover_steps=recover_steps, recover_options=options)
        result = made_smaller(
            model, parameters=parameters, energy=energy, rank_ratio=rank_ratio, rank=rank, calibration=batches,
            allocation=allocation, sequential=sequential, include=include, exclude=exclude,
            evaluate=None if others is None else lambda model: _loss(model, others),
        )  # fmt: skip
        tick()
        save_export(model, str(target), format, lambda where, state: model.save_pretrained(where, state_dict=state))
        copy_beside(folder, target)
        tick()
    if draw is not None and found is not None:
        draw(found, result)
    _report(result, found, target, format, json)


def _drawing(path: Path, parameters: float | None, calibration: str | None) -> Callable[[LossCurve, Any], None]:
    """What draws the curve, with the model that was made."""
    if parameters is None or calibration is None:
        raise typer.BadParameter("is of budgets: give --parameters and --calibration.", param_hint="--curve")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}. Make it first.", param_hint="--curve")
    if path.suffix not in PICTURES:
        given = f"must end in one of {', '.join(PICTURES)}, got '{path}'."
        raise typer.BadParameter(given, param_hint="--curve")
    try:
        from hf_drt.report import write_size_curve
    except ImportError as error:
        raise ImportError(f"--curve needs the package '{error.name}': pip install 'hf-drt[report]'.") from None

    def draw(curve: LossCurve, result: Compression | Recovery) -> None:
        compression = result.compression if isinstance(result, Recovery) else result
        losses = result.losses if isinstance(result, Recovery) else None
        marks = {} if compression is None or losses is None else {"recovered": (compression.parameters[1], losses[2])}
        sizes, values = [point.parameters for point in curve.points], [point.loss for point in curve.points]
        write_size_curve(sizes, values, marks, path)

    return draw


def _check_recovery(steps: int | None, dtype: str | None, calibration: str | None) -> None:
    if steps is not None and calibration is None:
        raise typer.BadParameter("needs --calibration, texts to recover on.", param_hint="--recover-steps")
    if dtype is not None and not steps:
        raise typer.BadParameter("has no effect without updates. Give --recover-steps.", param_hint="--recover-dtype")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got '{dtype}'.", param_hint="--recover-dtype")


def _batches(texts: str, folder: Path, model: nn.Module, samples: int, length: int) -> list[dict[str, Any]]:
    return text_batches(texts, folder, _is_causal(model), samples, length, _ROWS)


def _beyond(texts: str, folder: Path, model: nn.Module, samples: int, length: int, steps: int) -> list[dict[str, Any]]:
    """Batches of the texts after those of the calibration: one for each update, as far as the texts go."""
    first = -(-samples // _ROWS)
    return _batches(texts, folder, model, (first + steps) * _ROWS, length)[first:]


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _loss(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    """Mean over the batches of the model's own loss.

    Raises:
        ValueError: It has none.
    """
    losses = []
    for batch in batches:
        labels = {"labels": batch["input_ids"]} if _is_causal(model) else {}
        with torch.no_grad():
            loss = getattr(model(**batch, **labels), "loss", None)
        if loss is None:
            raise ValueError("the texts of --evaluation give no loss: they have no 'label'. Add it, or leave it out.")
        losses.append(float(loss))
    return sum(losses) / len(losses)


def _report(result: Compression | Recovery, curve: LossCurve | None, target: Path, format: str, json: bool) -> None:
    recovery = result if isinstance(result, Recovery) else None
    compression: Any = result if recovery is None else recovery.compression
    warning = compression.warning and f"{compression.warning} Give --calibration."
    if json:
        told = _compression_json(compression) | {"warning": warning}
        if curve is not None:
            told["curve"] = [point._asdict() for point in curve.points]
        print_json(told if recovery is None else told | {"recovery": _recovery_json(recovery)})
        return
    typer.echo(str(compression))
    if recovery is not None:
        typer.echo(f"\n{recovery}")
    if curve is not None:
        typer.echo(f"\nloss by budget, before any recovery\n{curve}")
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"written to {target} as {format}")


def _compression_json(result: Compression) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name, "shape": layer.shape, "rank": layer.rank, "error": layer.error,
            "parameters": layer.parameters,
        }
        for layer in result.layers
    ]  # fmt: skip
    return {
        "criterion": result.criterion, "allocation": result.allocation, "parameters": result.parameters,
        "model_parameters": result.model_parameters, "trials": [asdict(trial) for trial in result.trials],
        "loss": result.loss, "layers": layers,
    }  # fmt: skip


def _recovery_json(recovery: Recovery) -> dict[str, Any]:
    return {
        "steps": recovery.steps, "regained": recovery.regained, "losses": recovery.losses,
        "stages": [asdict(stage) for stage in recovery.stages],
        "layers": [asdict(layer) for layer in recovery.layers],
    }  # fmt: skip
