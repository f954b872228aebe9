"""The model as the user gets it, from ``save_model()`` and on the Hub: dense, native, or a PEFT adapter."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_drt.checkpoint import undeclared
from hf_drt.config import Export
from hf_drt.export.dense import dense_state_dict, marked_state_dict, merge_errors, presented
from hf_drt.export.leftovers import BASE_FOLDER, ModelFiles
from hf_drt.export.peft.save import check_adapters, write_adapter
from hf_drt.forms import AdapterLinear
from hf_drt.schedule import Plan

logger = logging.getLogger(__name__)


def save_export(
    model: nn.Module,
    folder: str,
    export: Export,
    save: Callable[[str, dict[str, Tensor] | None], Any],
    state: dict[str, Tensor] | None = None,
    repository: str | None = None,
) -> Export:
    """Save a model in any mix of forms.

    Args:
        model: Unwrapped.
        folder: Where to; an adapter's base goes into its :data:`BASE_FOLDER`. Model files of another form go: those
            of an earlier save are deleted, anybody else's are moved aside.
        export: 'dense' merges, 'native' keeps the forms, 'adapter' writes a LoRA checkpoint of PEFT and its base.
        save: Takes a folder, and the state dict that is to be written there or None. Without one it writes the model
            as it finds it, which is presented in the right form.
        state: The model's state dict where it has been gathered already.
        repository: ``user/name`` on the Hub, which an adapter names as the place of its base.

    Returns:
        The form that was written: 'dense' in place of 'adapter' where no layer is in adapter form.

    Raises:
        ValueError: 'adapter', and PEFT has no way to express the model. Nothing is written then.
    """
    if export == "adapter" and not any(isinstance(module, AdapterLinear) for module in model.modules()):
        logger.warning(
            "export=adapter, but no layer is in adapter form: training has stopped before its last phase, or the best "
            "model is of another one. The model is saved in dense form."
        )
        export = "dense"
    files = ModelFiles(Path(folder))
    match export:
        case "dense" if state is not None:
            with undeclared(model):
                save(folder, dense_tensors(model, state))
        case "dense":
            report_merge(merge_errors(model))
            with presented(model):
                save(folder, None)
        case "native":
            save(folder, state and marked_state_dict(model, state))
        case "adapter":
            base = Path(folder, BASE_FOLDER)
            check_adapters(model)
            files.make_room()
            with presented(model, lambda layer: layer.base):
                save(str(base), None)
            write_adapter(model, folder, repository or str(base))
    files.settle(adapter=export == "adapter")
    return export


def dense_tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered state dict as that of the dense model, with what rounding costs in the log."""
    report_merge(merge_errors(model, state))
    return dense_state_dict(model, state)


def report_merge(errors: dict[str, float]) -> None:
    """Log the largest of :func:`hf_drt.export.dense.merge_errors`, as a warning where it is above 0.1."""
    if not errors:
        return
    name, worst = max(errors.items(), key=lambda entry: entry[1])
    if worst > 0.1:
        logger.warning(
            "dense export: rounding to the weights' dtype loses %.0f %% of what the factors of %s hold, the most of %d "
            "layers. Convert the model to float32 and save it again, or use export=native or adapter.",
            100 * worst,
            name,
            len(errors),
        )
    else:
        logger.info("dense export: rounding error of the merge at most %.2g (%d layers)", worst, len(errors))


def check_export(export: Export, plan: Plan, args: Any, fsdp: bool, grows: bool = False) -> None:
    """Whether every model that the run will save can be saved in that form.

    Args:
        export: Of the settings.
        plan: Resolved phases.
        args: Of the Trainer.
        fsdp: Whether the model is sharded.
        grows: Whether full-rank windows are added to the plan during the run.

    Raises:
        ValueError: An adapter of a phase that has none, or a push of what no single process holds.
    """
    if export == "adapter" and grows:
        raise ValueError(
            "export=adapter saves layers in adapter form, but a full-rank window of the preset adaptive may last to "
            "the end of the run. Use export=dense or native, or a schedule that ends in an adapter phase."
        )
    pushes = args.push_to_hub and args.hub_strategy != HubStrategy.END and args.save_strategy != SaveStrategy.NO
    saved = plan.phases if pushes else plan.phases[-1:]
    if export == "adapter" and (other := next((phase for phase in saved if phase.kind != "adapter"), None)):
        raise ValueError(
            f"export=adapter saves layers in adapter form, but in phase '{other}' they are {other.kind}. End the "
            "schedule with an adapter phase, and push with hub_strategy=end; or use export=dense or native."
        )
    if fsdp and (pushes or export == "adapter"):
        raise ValueError(
            f"under FSDP no process holds the model to push it during training (hub_strategy={args.hub_strategy.value})"
            " or to save it with export=adapter. Use hub_strategy=end, and export=dense or native."
        )
