"""The model as the user gets it, from ``save_model()`` and on the Hub, in the form of an exporter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hf_drt.export.exporter import Saving, State
from hf_drt.export.leftovers import ModelFiles
from hf_drt.export.merge import low_rank_layers
from hf_drt.export.written import Written
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Plan


def save_export(
    model: nn.Module,
    folder: str,
    export: str,
    save: Callable[[str, State | None], Any],
    state: State | None = None,
    repository: str | None = None,
    writes: bool = True,
) -> str:
    """Save a model in any mix of forms.

    Args:
        model: Unwrapped.
        folder: Where to; an adapter's base goes into its :data:`hf_drt.export.leftovers.BASE_FOLDER`. Model files of
            another form go: those of an earlier save are deleted, anybody else's are moved aside.
        export: Name of the exporter.
        save: Takes a folder, and the state dict that is to be written there or None. Without one it writes the model
            as it finds it, which is presented in the right form.
        state: The model's state dict where it has been gathered already.
        repository: ``user/name`` on the Hub, which an adapter names as the place of its base.
        writes: Whether this process writes files; of several that save together one does.

    Returns:
        The form that was written: 'dense' in place of 'adapter' where no layer is in adapter form.

    Raises:
        ValueError: No exporter of that name, or it has no way to express the model. Nothing is written then.
    """
    exporter = EXPORTERS.find(export)
    if other := exporter.instead(model):
        export, exporter = other, EXPORTERS.find(other)
    files = ModelFiles(Path(folder))
    exporter.write(Saving(model, Path(folder), save, state, repository, files, writes))
    if writes:
        files.settle(exporter.files, exporter.has_base)
    return export


def check_export(export: str, plan: Plan, args: Any, sharded: bool, grows: bool = False) -> None:
    """Whether every model that the run will save can be saved in that form.

    Args:
        export: Of the settings.
        plan: Resolved phases.
        args: Of the Trainer.
        sharded: Whether processes share the model or its optimizer's state out among them (FSDP, DeepSpeed).
        grows: Whether full-rank windows are added to the plan during the run.

    Raises:
        ValueError: An adapter of a phase that has none, or a form that a sharded model cannot be written in.
    """
    exporter = EXPORTERS.find(export)
    pushes = args.push_to_hub and args.hub_strategy.value != "end" and args.save_strategy.value != "no"
    exporter.check_phases(plan.phases if pushes else plan.phases[-1:], grows)
    if sharded and not exporter.sharded:
        raise ValueError(
            f"export={export} needs the whole model, and no process holds it under FSDP or DeepSpeed. Use export=dense "
            "or native, or train with DDP (leave fsdp and deepspeed out of the training arguments)."
        )


def check_written(folder: Path, model: nn.Module, export: str, since: float) -> None:
    """Compare the weights that were written with the model.

    Args:
        folder: Where to; subfolders too, but those of checkpoints.
        model: Unwrapped, in the form that it is in.
        export: The form that was written.
        since: Files that are older (in seconds since the epoch) are not looked at.

    Raises:
        CheckpointError: What has landed is of another form, or of other values.
    """
    if not any(True for _ in low_rank_layers(model)):
        return
    written = Written(folder, since)
    if written.is_empty:
        written.say_unchecked(export)
    else:
        EXPORTERS.find(export).verify(written, model)
