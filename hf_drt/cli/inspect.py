"""``hf-drt inspect``: what is in a checkpoint."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from hf_drt.cli.output import print_json, progress
from hf_drt.cli.source import local_folder
from hf_drt.forms import Dense, form_to_dict
from hf_drt.inspect import Checkpoint, Spectrum, StoredLayer, read_checkpoint, spectra
from hf_drt.tables import print_table

_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_ERRORS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder, safetensors file, or a repository on the Hub.")],
    include: Annotated[list[str] | None, Option(help="Regular expression on layers; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, Option(help="Regular expression on layers; may be repeated.")] = None,
    forms: Annotated[bool, Option("--forms", help="Forms and ranks alone: no weight is read.")] = False,
    curves: Annotated[bool, Option("--curves", help="Energy that ranks keep, in place of errors.")] = False,
    picture: Annotated[Path | None, Option(help="Write the energy curves as a picture (extra 'report').")] = None,
    json: Annotated[bool, Option("--json", help="JSON in place of tables.")] = False,
) -> None:
    """What is in a checkpoint: forms, ranks, spectra, and what could be truncated at which error.

    Of any model in safetensors files; layers are read one at a time.
    """
    found = read_checkpoint(local_folder(checkpoint))
    if not found.layers:
        raise ValueError(
            f"{checkpoint} holds no linear layer to inspect beside {len(found.fused)} weights of fused experts, whose "
            "spectra are not read."
        )
    layers = _chosen(found.layers, include, exclude)
    read: list[Spectrum] = []
    if not forms:
        with progress("singular values", len(layers)) as tick:
            read = list(spectra(layers, tick))
    if json:
        print_json(_as_json(found, layers, read))
    else:
        _print(checkpoint, found, layers, read, curves)
    if picture is not None and read:
        _draw(read, picture)
        typer.echo(f"{picture} written", err=True)


def _chosen(layers: Sequence[StoredLayer], include: list[str] | None, exclude: list[str] | None) -> list[StoredLayer]:
    try:
        chosen = [
            layer
            for layer in layers
            if (not include or any(re.search(pattern, layer.name) for pattern in include))
            and not any(re.search(pattern, layer.name) for pattern in exclude or ())
        ]
    except re.error as error:
        raise typer.BadParameter(f"{error} is not a regular expression", param_hint="--include / --exclude") from None
    if not chosen:
        raise ValueError(f"none of the {len(layers)} layers is left by --include and --exclude, e.g. {layers[0].name}.")
    return chosen


def _print(
    source: str, found: Checkpoint, layers: Sequence[StoredLayer], read: Sequence[Spectrum], curves: bool
) -> None:
    typer.echo(f"{source}: {found.kind}, {found.parameters:,} stored parameters, {len(found.layers)} linear layers")
    if found.fused:
        typer.echo(f"not shown: {len(found.fused)} weights of fused experts, e.g. {next(iter(found.fused))}")
    if found.plan is not None:
        plan, steps, phase = found.plan
        typer.echo(f"plan: {plan} over {steps} update steps; in phase {phase} ({plan.split()[phase]})")
    typer.echo("")
    if not read:
        print_table(["layer", "form", "out x in", "rank"], [_form_cells(layer) for layer in layers], left=2)
        return
    what = "energy" if curves else "error"
    columns = ["layer", "form", "out x in", "rank", "effective", "stable", "90%", "99%"]
    columns += [f"{what} at 1/{round(1 / share)}" for share in _SHARES]
    print_table(columns, [_form_cells(spectrum.layer) + _spectral_cells(spectrum, curves) for spectrum in read], left=2)
    typer.echo(
        "\n90%, 99%: rank that keeps this share of ||W||_F^2; at 1/n: of a truncation to that share of min(out, in)"
    )
    typer.echo("\nwhat could be truncated, by the largest relative Frobenius error of a layer:")
    print_table(["error", "layers in factors", "parameters", "share"], _truncations(read), left=0)


def _form_cells(layer: StoredLayer) -> list[str]:
    rank = "full" if isinstance(layer.form, Dense) else f"{layer.form.rank}"
    return [layer.name, type(layer.form).__name__.lower(), f"{layer.shape[0]} x {layer.shape[1]}", rank]


def _spectral_cells(spectrum: Spectrum, curves: bool) -> list[str]:
    shares = (spectrum.energy(share) if curves else spectrum.error(share) for share in _SHARES)
    ranks = (f"{spectrum.effective_rank:.1f}", f"{spectrum.stable_rank:.1f}")
    return [*ranks, *(f"{spectrum.energy_rank(share)}" for share in (0.9, 0.99)), *(f"{share:.4f}" for share in shares)]


def _truncations(read: Sequence[Spectrum]) -> list[list[str]]:
    dense = sum(Dense().parameters(*spectrum.layer.shape) for spectrum in read)
    rows = []
    for error in _ERRORS:
        forms = [(spectrum.truncated(error), spectrum.layer.shape) for spectrum in read]
        left = sum(form.parameters(*shape) for form, shape in forms)
        factored = sum(form != Dense() for form, _ in forms)
        rows.append([f"{error:g}", f"{factored} of {len(read)}", f"{left:,}", f"{left / dense:.3f}"])
    return rows


def _as_json(found: Checkpoint, layers: Sequence[StoredLayer], read: Sequence[Spectrum]) -> dict[str, Any]:
    entries = [{"name": layer.name, "shape": layer.shape, **form_to_dict(layer.form)} for layer in layers]
    for entry, spectrum in zip(entries, read, strict=False):
        entry |= {
            "effective_rank": spectrum.effective_rank, "stable_rank": spectrum.stable_rank,
            "singular_values": spectrum.values.tolist(),
            "truncations": [{"error": e, **form_to_dict(spectrum.truncated(e))} for e in _ERRORS],
        }  # fmt: skip
    plan = None if found.plan is None else dict(zip(("phases", "max_steps", "phase"), found.plan, strict=True))
    return {"kind": found.kind, "parameters": found.parameters, "plan": plan, "layers": entries}


def _draw(read: Sequence[Spectrum], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install 'hf-drt[report]'.") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for spectrum in read:
        energy = (spectrum.values.double() ** 2).cumsum(0)
        ranks = [(index + 1) / min(spectrum.layer.shape) for index in range(len(energy))]
        axes.plot(ranks, energy / energy[-1], linewidth=1, alpha=0.7, label=spectrum.layer.name)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="rank / min(out, in)", ylabel="share of $||W||_F^2$")
    if len(read) <= 12:
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
