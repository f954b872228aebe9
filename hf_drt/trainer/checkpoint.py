"""Does a checkpoint folder fit the run? Answered from headers and small files, before a weight is touched."""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME

from hf_drt.checkpoint import (
    INPUTS_NAME,
    STATE_NAME,
    CheckpointError,
    Shapes,
    read_state,
    shapes_by_file,
    stored_shapes,
    transformers_models,
    weight_files,
)
from hf_drt.controller import DynamicRank
from hf_drt.engines import engine_of
from hf_drt.forms import (
    Dense,
    SplitAttention,
    dense_key,
    form_from_dict,
    layer_of,
    layout_of,
    split_attentions,
    tensor_shapes,
)
from hf_drt.optim import rule_of, unwrap
from hf_drt.trainer.engine_files import FSDP, PLAIN, check_engine, check_engine_files, files_of

logger = logging.getLogger(__name__)

_OTHER = "Resume from another checkpoint."
_BROKEN_JSON = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError)


def readable_state(folder: str | Path, for_resume: bool, engine: str = PLAIN) -> dict[str, Any]:
    """The structure state of a checkpoint whose files are there and whole, be it of this run or another.

    Args:
        folder: ``checkpoint-N``.
        for_resume: Also require the optimizer's, scheduler's and trainer's files; False to load weights only.
        engine: Whose files the run writes (:func:`hf_drt.trainer.engine_files.files_of_run`).

    Raises:
        CheckpointError: A file is missing, cut short or edited; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the path of a checkpoint-N folder.")
    state = read_state(folder)
    if not isinstance(state.get("meter", {}), dict):
        raise CheckpointError(f"{folder / STATE_NAME} is damaged: its 'meter' is {state['meter']!r}. {_OTHER}")
    check_engine(folder, engine)
    if for_resume:
        _check_trainer_files(folder, state)
    return state


def checked_state(folder: str | Path, controller: DynamicRank, for_resume: bool, engine: str = PLAIN) -> dict[str, Any]:
    """:func:`readable_state`, after the whole folder has been compared with the run.

    Args:
        folder, for_resume, engine: As there.
        controller: The run's plan and model.

    Raises:
        CheckpointError: As there, or it belongs to another run.
    """
    folder = Path(folder)
    state = readable_state(folder, for_resume, engine)
    try:
        controller.check_state(state)
    except ValueError as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from None
    if engine != FSDP or weight_files(folder, _OTHER)[0].is_file():  # in shards, they are compared as they are loaded
        with engine_of(controller.model).readable():
            _check_weights(folder, controller, state)
    return state


def last_complete_checkpoint(folder: str | Path) -> str:
    """The checkpoint-N with the largest N whose files are all there and whole, as after a kill in the middle of saving.

    All processes call it and get the same one: process 0 lists the folder, and what any process finds incomplete, be it
    on a file system of its own, is passed over by all.

    Raises:
        CheckpointError: There is none; the message says what is wrong with each.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    names = sorted((path.name for path in found), key=lambda name: -int(name.rpartition("-")[2]))
    problems = []
    for name in broadcast_object_list([names])[0]:
        faults = [fault for fault in gather_object([_fault(Path(folder, name))]) if fault is not None]
        if not faults:
            return str(Path(folder, name))
        problems.append(f"{name}: {faults[0]}")
        logger.warning("%s is passed over: %s", name, faults[0])
    raise CheckpointError(
        f"{folder} holds no complete checkpoint. {' '.join(problems) or 'It has none at all.'} Train without "
        "resume_from_checkpoint to begin anew."
    )


def _fault(folder: Path) -> str | None:
    try:
        _check_trainer_files(folder, read_state(folder))
        if files_of(folder) != FSDP:
            _stored_shapes(folder)
    except CheckpointError as error:
        return str(error)
    return None


def random_state_files(args: TrainingArguments) -> list[str]:
    """Names of the files with the processes' random states that belong into a checkpoint of this run."""
    processes = range(args.world_size)
    if args.save_on_each_node:
        first = args.process_index - args.local_process_index
        processes = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return [random_state_file(process, args.world_size) for process in processes]


def random_state_file(process: int, processes: int) -> str:
    """Name of the file with the random state of one process of several, or of the only one."""
    return f"rng_state_{process}.pth" if processes > 1 else "rng_state.pth"


def check_optimizer(folder: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """Compare a checkpoint's optimizer with the one that shall load it. torch compares the number of parameters only,
    and a fused step on a moment of another shape ends the process.

    Raises:
        CheckpointError: Other options, other groups, or a moment of another shape.
    """
    path = Path(folder) / OPTIMIZER_NAME
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(stored, dict) or "param_groups" not in stored:
        raise CheckpointError(f"{path} is not an optimizer's state. {_OTHER}")
    optimizer = unwrap(optimizer)
    rule = rule_of(optimizer)
    groups, own = stored["param_groups"], optimizer.param_groups
    sizes, own_sizes = ([len(group["params"]) for group in g] for g in (groups, own))
    if sizes != own_sizes:
        raise CheckpointError(
            f"{path} has parameter groups of {sizes} parameters, this run's optimizer of {own_sizes}. Resume with the "
            "optimizer settings of the run that wrote it."
        )
    for group, other in zip(groups, own, strict=True):
        if lacking := sorted(set(other) - set(group) - {"initial_lr", "param_names"}):
            raise CheckpointError(
                f"{path} is of another optimizer: its groups lack {', '.join(lacking)}. Resume with the same optim."
            )
        for index, parameter in zip(group["params"], other["params"], strict=True):
            for key, value in _entries(stored["state"].get(index, {})):
                expected = rule.state_shape(key, parameter.shape)
                if torch.is_tensor(value) and value.ndim and expected not in (None, value.shape):
                    raise CheckpointError(
                        f"{path} holds {key} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}: it belongs to another phase or model. {_OTHER}"
                    )


def _entries(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those of one parameter's state, also where a library has put some of them into a dictionary inside."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def _check_trainer_files(folder: Path, state: dict[str, Any]) -> None:
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. {_OTHER}")
    try:
        step = TrainerState.load_from_json(str(path)).global_step
        if (folder / CONFIG_NAME).is_file():
            path = folder / CONFIG_NAME
            json.loads(path.read_text())
    except _BROKEN_JSON as error:
        raise CheckpointError(f"{path} is damaged ({error}). {_OTHER}") from None
    if step != state.get("step"):
        raise CheckpointError(
            f"{folder} mixes two checkpoints: {TRAINER_STATE_NAME} is of step {step}, {STATE_NAME} of step "
            f"{state.get('step')}. {_OTHER}"
        )
    if state.get("inputs"):
        shapes_by_file([folder / INPUTS_NAME], _OTHER)
    check_engine_files(folder)
    own = (SCHEDULER_NAME,) if files_of(folder) else (OPTIMIZER_NAME, SCHEDULER_NAME)
    for name in own:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing: training cannot go on from here (was it saved with save_only_model?). "
                f"{_OTHER}"
            )
    _check_random_states(folder, state)
    for path in (*(folder / name for name in own), *folder.glob(SCALER_NAME)):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged. {_OTHER}")
    scheduler = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
    if not isinstance(scheduler, dict) or "param_groups" in scheduler:
        raise CheckpointError(f"{folder / SCHEDULER_NAME} is not a scheduler's state. {_OTHER}")


def _check_random_states(folder: Path, state: dict[str, Any]) -> None:
    """The random states that the state file names; of the same number of processes each looks after its own."""
    names = state.get("random_states", [path.name for path in folder.glob("rng_state*.pth")])
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{folder / STATE_NAME} is damaged: its 'random_states' is {names!r}. {_OTHER}")
    own = random_state_file(PartialState().process_index, PartialState().num_processes)
    for path in (folder / name for name in ([own] if own in names else names)):
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: from here a process would go on with other random numbers. {_OTHER} To go on all "
                f"the same, remove 'random_states' from {STATE_NAME}."
            )
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged. {_OTHER}")


def _check_weights(folder: Path, controller: DynamicRank, state: dict[str, Any]) -> None:
    stored, expected = _stored_shapes(folder), _expected_shapes(controller.model, state["layers"])
    layer = next(iter(state["layers"]))
    own_names = [name for name in expected if name.startswith(layer)]
    near = own_names or [name for name in expected if name.startswith(layer.rpartition(".")[0])]  # packed attention
    prefix = _container_prefix(near[0], stored)
    if prefix is None and transformers_models(controller.model) != [controller.model]:
        logger.info("%s: the weights lie in a library's own layout; they are looked at once they are loaded.", folder)
        return
    stored = {f"{prefix or ''}{name}": shape for name, shape in stored.items()}
    expected = {name: shape for name, shape in expected.items() if name.startswith(prefix or "")}
    own = controller.model.state_dict()
    shared = _pointers(own, stored) if expected.keys() - stored.keys() else set()  # tied weights are saved once
    for name, shape in expected.items():
        if name not in stored:
            if name not in own or own[name].data_ptr() not in shared:
                raise CheckpointError(f"the weights in {folder} lack {name}, which the run's model needs. {_OTHER}")
        elif stored[name] != shape:
            raise CheckpointError(
                f"{name} has shape {stored[name]} in the weights of {folder}, where {shape} is needed: they were "
                f"edited, or are of another model. {_OTHER}"
            )
    sentinels = {dense_key(controller.model, name) for name in state["layers"]}
    sentinels |= {attention.mark(f"{name}.") for name, attention in split_attentions(controller.model)}
    for name in sorted(set(stored) - set(expected)):
        if name in sentinels and 0 in stored[name]:
            continue
        if name in own or name.rpartition(".")[0] in state["layers"]:
            raise CheckpointError(f"the weights in {folder} hold {name}, which does not fit its {STATE_NAME}. {_OTHER}")


def _expected_shapes(model: nn.Module, layers: dict[str, dict[str, Any]]) -> Shapes:
    """Shapes of the whole model's state with the target layers in the forms of a checkpoint."""
    shapes: Shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in layers and (name.rpartition(".")[0] not in layers or name.endswith(".bias"))
    }
    for name, entry in layers.items():
        entry = dict(entry)
        shape, module = tuple(entry.pop("shape")), layer_of(model, name)
        tensors = tensor_shapes(form_from_dict(entry), shape, layout_of(module))
        shapes |= {
            dense_key(model, name) if key == "weight" else f"{name}.{key}": value for key, value in tensors.items()
        }
    for name, attention in split_attentions(model):
        _name_attention(f"{name}.", attention, shapes, layers)
    return shapes


def _name_attention(prefix: str, attention: SplitAttention, shapes: Shapes, layers: dict[str, dict[str, Any]]) -> None:
    """The names that split attention has in a checkpoint: the packed ones while all of its layers are dense."""
    packed, split = attention.packed_shapes(prefix), attention.split_shapes(prefix)
    forms = [form_from_dict({k: v for k, v in entry.items() if k != "shape"}) for name, entry in layers.items()
             if name.rpartition(".")[0] == prefix[:-1]]  # fmt: skip
    if all(isinstance(form, Dense) and form.dtype is None for form in forms):
        stale, now = {*split, attention.mark(prefix)}, packed
    else:
        stale = {*packed, attention.mark(prefix)}
        now = {
            key: shape for key, shape in split.items() if key.endswith(".bias") or key.rpartition(".")[0] not in layers
        }
    for key in stale:
        shapes.pop(key, None)
    shapes.update(now)


def _pointers(state: dict[str, torch.Tensor], stored: Shapes) -> set[int]:
    """Where the tensors lie that are stored under one of their names."""
    return {tensor.data_ptr() for name, tensor in state.items() if name in stored}


def _container_prefix(name: str, stored: Shapes) -> str | None:
    """What a tensor's name in the model has before its name in the file: nothing, or where a library saves the model
    inside a container of its own, the way to that. None where the file does not have it under any such name."""
    parts = name.split(".")
    found = (start for start in range(len(parts) - 1) if ".".join(parts[start:]) in stored)
    start = next(found, None)
    return None if start is None else "".join(f"{part}." for part in parts[:start])


def _stored_shapes(folder: Path) -> Shapes:
    """Of all tensors; none where a library has put them into folders inside this one."""
    files = weight_files(folder, _OTHER)
    if len(files) != 1 or files[0].is_file():
        return stored_shapes(files, _OTHER)
    if (folder / WEIGHTS_NAME).is_file():
        return _pickled_shapes(folder / WEIGHTS_NAME)
    return {} if any(folder.glob("*/*.safetensors")) else stored_shapes(files, _OTHER)


def _pickled_shapes(path: Path) -> Shapes:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}). {_OTHER}") from None
