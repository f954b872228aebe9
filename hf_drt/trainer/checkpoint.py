"""Does a checkpoint folder fit the run? Answered from headers and small files, before a weight is touched."""

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_drt.controller import DynamicRank
from hf_drt.forms import form_from_dict, is_transposed, tensor_shapes
from hf_drt.forms.modules import LowRankLinear
from hf_drt.state import CheckpointError, read_state

_OTHER = "Resume from another checkpoint."


def checked_state(folder: str | Path, controller: DynamicRank, for_resume: bool) -> dict[str, Any]:
    """The structure state of a checkpoint, after the whole folder has been compared with the run.

    Args:
        folder: ``checkpoint-N``.
        controller: The run's plan and model.
        for_resume: Also require the optimizer's, scheduler's and trainer's files; False to load weights only.

    Raises:
        CheckpointError: A file is missing, cut short or edited, or belongs to another run; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give the path of a checkpoint-N folder.")
    state = read_state(folder)
    try:
        controller.check_state(state)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    if for_resume:
        _check_trainer_files(folder, state)
    _check_weights(folder, controller, state)
    return state


def _check_trainer_files(folder: Path, state: dict[str, Any]) -> None:
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {_OTHER}")
    try:
        step = json.loads(path.read_text())["global_step"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged. {_OTHER}") from None
    if step != state.get("step"):
        raise CheckpointError(
            f"{folder} mixes two checkpoints: {TRAINER_STATE_NAME} is of step {step}, drt_state.json of step "
            f"{state.get('step')}. {_OTHER}"
        )
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: training cannot go on from here (was it saved with save_only_model?). {_OTHER}"
            )
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged. {_OTHER}")


def _check_weights(folder: Path, controller: DynamicRank, state: dict[str, Any]) -> None:
    shapes = _stored_shapes(folder)
    modules = dict(controller.model.named_modules())
    for name, entry in state["layers"].items():
        entry = dict(entry)
        shape = tuple(entry.pop("shape"))
        module = modules[name]
        transposed = module.transposed if isinstance(module, LowRankLinear) else is_transposed(module)
        for key, expected in tensor_shapes(form_from_dict(entry), shape, transposed).items():
            stored = shapes.get(f"{name}.{key}")
            if stored is None:
                raise CheckpointError(f"the weights in {folder} lack {name}.{key}, needed by drt_state.json. {_OTHER}")
            if stored != expected:
                raise CheckpointError(
                    f"{name}.{key} has shape {stored} in the weights of {folder}, and {expected} in drt_state.json: "
                    f"one of them was edited. {_OTHER}"
                )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files, single or sharded, from their headers."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is damaged. {_OTHER}") from None
    else:
        files = [SAFE_WEIGHTS_NAME]
    shapes = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {_OTHER}")
        try:
            with safe_open(path, framework="pt") as weights:
                shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is cut short or damaged ({error}). {_OTHER}") from None
    return shapes
