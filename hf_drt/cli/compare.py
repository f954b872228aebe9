"""``hf-drt compare``: how two checkpoints differ."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoTokenizer
from typer import Option

from hf_drt.cli.output import print_json, progress
from hf_drt.cli.source import load, local_folder
from hf_drt.forms import Dense
from hf_drt.inspect import (
    Checkpoint,
    LogitDifference,
    StoredLayer,
    WeightDifference,
    common_layers,
    logit_difference,
    read_checkpoint,
    weight_differences,
)
from hf_drt.simulate import batch_spec
from hf_drt.tables import print_table


def compare(
    first: Annotated[str, typer.Argument(help="Folder of a model or checkpoint, or a repository on the Hub.")],
    second: Annotated[str, typer.Argument(help="The one to compare with it.")],
    text: Annotated[str | None, Option(help="Compare logits on this text; by default on random input.")] = None,
    samples: Annotated[int, Option(min=1, help="Random samples.")] = 4,
    length: Annotated[int, Option(min=1, help="Tokens of a random sample.")] = 32,
    seed: Annotated[int, Option(min=0, help="Of the random samples.")] = 0,
    task: Annotated[str | None, Option(help="E.g. causal-lm; by default what the configuration says.")] = None,
    spectra: Annotated[bool, Option(help="Compare the weights, layer by layer.")] = True,
    logits: Annotated[bool, Option(help="Load both models, and compare what they compute.")] = True,
    tolerance: Annotated[float | None, Option(min=0, help="Exit with 1 if a logit differs by more than this.")] = None,
    json: Annotated[bool, Option("--json", help="JSON in place of tables.")] = False,
) -> None:
    """How two checkpoints differ: logits on the same input, and the weights of their layers."""
    folders = [local_folder(source) for source in (first, second)]
    found = [read_checkpoint(folder) for folder in folders]
    pairs = common_layers(*(checkpoint.layers for checkpoint in found))
    outputs = _outputs(folders[0], folders[1], task, text, samples, length, seed) if logits else None
    weights = _weights(pairs) if spectra else []
    if json:
        print_json({"logits": outputs and asdict(outputs), "layers": [_as_json(w) for w in weights]})
    else:
        _print(outputs, weights)
        if spectra:
            _print_left_out(found, bool(pairs))
    if tolerance is not None and outputs is not None and not outputs.largest <= tolerance:
        typer.echo(f"a logit differs by {outputs.largest:.3g}, more than {tolerance:g}", err=True)
        raise typer.Exit(1)


def _outputs(
    first: Any, second: Any, task: str | None, text: str | None, samples: int, length: int, seed: int
) -> LogitDifference:
    a, b = load(first, task), load(second, task)
    if text is None:
        inputs = batch_spec(a, samples, length, labels=False).random(torch.Generator().manual_seed(seed))
    else:
        inputs = _tokens(first, second, text, a)
    return logit_difference(a, b, inputs)


def _tokens(first: Any, second: Any, text: str, model: nn.Module) -> dict[str, Tensor]:
    """The text by the tokenizer that lies beside one of the models."""
    for folder in (first, second):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            tokens = dict(AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt"))
            if model.config.is_encoder_decoder:
                tokens["decoder_input_ids"] = tokens["input_ids"]
            return tokens
    raise ValueError(
        f"neither {first} nor {second} holds a tokenizer for --text. Copy one beside the weights "
        "(tokenizer.save_pretrained), or compare on random tokens, without --text."
    )


def _weights(pairs: Sequence[tuple[StoredLayer, StoredLayer]]) -> list[WeightDifference]:
    with progress("weights", len(pairs)) as tick:
        return list(weight_differences(pairs, tick))


def _print(outputs: LogitDifference | None, weights: Sequence[WeightDifference]) -> None:
    if outputs is not None:
        typer.echo(f"logits at {outputs.positions} positions:")
        typer.echo(f"  largest difference   {outputs.largest:.4g}")
        typer.echo(f"  mean difference      {outputs.mean:.4g}")
        typer.echo(f"  relative difference  {outputs.relative:.4g}")
        typer.echo(f"  KL divergence        {outputs.divergence:.4g} nats")
        typer.echo(f"  same largest logit   {outputs.agreement:.2%}")
    if weights:
        typer.echo("" if outputs is not None else "weights:")
        columns = ["layer", "first", "second", "relative difference", "effective rank", "of the second"]
        print_table(columns, [_cells(weight) for weight in weights], left=3)


def _print_left_out(found: Sequence[Checkpoint], compared: bool) -> None:
    if fused := max((checkpoint.fused for checkpoint in found), key=len):
        typer.echo(f"weights of fused experts: not compared, {len(fused)}, e.g. {next(iter(fused))}")
    if not compared:
        names = " and ".join([*(layer.name for layer in c.layers), *c.fused][0] for c in found)
        typer.echo(f"weights: not compared, since no layer has the same name in both, e.g. {names}")


def _cells(weight: WeightDifference) -> list[str]:
    forms = (_form(weight.a), _form(weight.b))
    return [weight.a.name, *forms, f"{weight.relative:.4g}", *(f"{rank:.1f}" for rank in weight.effective_ranks)]


def _form(layer: StoredLayer) -> str:
    name = type(layer.form).__name__.lower()
    return name if isinstance(layer.form, Dense) else f"{name}:{layer.form.rank}"


def _as_json(weight: WeightDifference) -> dict[str, Any]:
    return {
        "name": weight.a.name, "forms": [_form(weight.a), _form(weight.b)], "relative_difference": weight.relative,
        "effective_ranks": weight.effective_ranks,
    }  # fmt: skip
