"""PEFT -> adapter form."""

import json
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.declaration import declare
from hf_drt.forms import Adapter, Conversion, LowRankLinear, form_of, layout_of, prepare, weight_shape
from hf_drt.hub.peft.files import CONFIG_NAME, WEIGHTS_NAME, grouped, local_folder, read_weights
from hf_drt.selection import find_targets
from hf_drt.surgery import Swap, replace
from hf_drt.wording import some

logger = logging.getLogger(__name__)

# Fields of adapter_config.json that are read, or that leave what the weights compute as it is. Any other that is set
# names a variant of LoRA.
_PLAIN_FIELDS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save",
    "init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
# Starts that leave the base as published; the others (pissa, olora, corda, loftq, lora_ga) subtract B A from it.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_MERGE = "Merge it in PEFT (merge_and_unload), and start from the dense model."


@torch.no_grad()
def load_peft_adapter(
    model: nn.Module, folder: str | os.PathLike, *, revision: str | None = None
) -> dict[str, Adapter]:
    """Bring a dense model's layers into adapter form, with the weights of a LoRA checkpoint of the PEFT library.

    The model then computes what PEFT's does, and dynamic-rank training can go on from a LoRA run, inflate it for one::

        model = AutoModelForCausalLM.from_pretrained(base)
        forms = load_peft_adapter(model, "lora-run")
        drt = DynamicRank(model, DRTConfig(schedule="adapter@0 dense@20%"), max_steps=1000)

    An adapter phase whose rank and alpha (``DRTConfig.rank_pattern``, ``adapter_alpha``) are those of ``forms`` goes on
    with these weights; one with other values merges them into W first and begins anew. What PEFT kept frozen outside
    of the adapters is trainable in the result, as in any dense model: freeze what shall not be trained.

    Trained biases and ``modules_to_save`` are copied into the model. The scaling ``alpha / sqrt(r)`` of rank-stabilized
    LoRA (Kalajdzievski 2023) becomes alpha' / r with alpha' = alpha sqrt(r). LoRA weights are cast to the dtype of the
    layer; dropout is left behind.

    Args:
        model: As the adapter was trained on: same class, same weights, no layer in a low-rank form.
        folder: Local folder, or the name of a repository on the Hub.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The form of every adapted layer, by name.

    Raises:
        ValueError: The checkpoint is incomplete or no plain LoRA, or does not fit the model, which is left as it was.
    """
    folder = local_folder(folder, revision)
    config = _read_config(folder)
    if low_rank := [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        raise ValueError(
            f"{some(low_rank)} is in form {form_of(model.get_submodule(low_rank[0]))} already. Load the adapter into "
            "the dense model that it was trained on."
        )
    pairs, others = grouped(folder / WEIGHTS_NAME, read_weights(folder))
    _check_others(folder / WEIGHTS_NAME, others, model)
    layers = _layers(model, pairs)
    forms = {name: _form(name, *pairs[name], layer, config) for name, layer in layers.items()}
    swaps, conversions = [], []
    for name, layer in layers.items():
        conversions.append(_conversion(layer, forms[name], *pairs[name]))
        swaps.append(Swap(name, layer, conversions[-1].module))
    replace(model, swaps)
    for conversion in conversions:
        conversion.commit()
    declare(model)
    state = model.state_dict()
    for name, value in others.items():
        state[name].copy_(value)
    return forms


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is no adapter of PEFT. Give the folder that holds it.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Save the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path} describes an adapter of type {kind!r}; only LORA is W + s B A. {_MERGE}")
    for field, value in config.items():
        if value and field not in _PLAIN_FIELDS:
            raise ValueError(f"{path} sets {field}={value!r}, which is more than W + s B A. {_MERGE}")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise ValueError(
            f"{path} has init_lora_weights={config['init_lora_weights']!r}, which changes W before training, so that "
            "the adapter does not fit the published base. Convert it in PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it (merge_and_unload)."
        )
    if config.get("lora_dropout"):
        logger.warning("%s: lora_dropout=%s is left behind; adapter form has none.", path, config["lora_dropout"])
    return config


def _check_others(path: Path, others: dict[str, Tensor], model: nn.Module) -> None:
    """Tensors beside the pairs must be tensors of the model, of their shape and of one place."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if strange := [name for name in others if name not in own]:
        raise ValueError(
            f"{path} holds {some(strange)}, which is no LoRA weight of a linear layer, and no tensor of "
            f"{type(model).__name__}. Load the adapter into the class that it was trained on; if it has LoRA on "
            f"embeddings or convolutions, that cannot be loaded. {_MERGE}"
        )
    for name, tensor in others.items():
        if tuple(tensor.shape) != own[name]:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, and {own[name]} in {type(model).__name__}. Load the "
                "adapter into the model that it was trained on (resize_token_embeddings, num_labels)."
            )
    for names in _tied(model):
        saved = [name for name in names if name in others]
        whole = len(saved) == len(names) and all(torch.equal(others[saved[0]], others[name]) for name in saved)
        if saved and not whole:
            raise ValueError(
                f"{path} holds {some(saved)}, but {type(model).__name__} ties it to another tensor "
                f"({', '.join(names)}), which PEFT has not trained along. Load a model whose weights are not tied "
                "(tie_word_embeddings=False)."
            )


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _layers(model: nn.Module, pairs: dict[str, Any]) -> dict[str, nn.Module]:
    """The adapted layers, in the model's order; each has to be one that may change form."""
    selection = find_targets(model)
    modules = dict(model.named_modules())
    for name in pairs:
        if name not in modules:
            raise ValueError(
                f"the adapter has weights for {name}, and {type(model).__name__} has no layer of that name. Load the "
                "adapter into the class that it was trained on (base_model_class in its configuration)."
            )
        if name not in selection.targets:
            reason = selection.skipped.get(name) or f"a {type(modules[name]).__name__}, no linear layer"
            raise ValueError(
                f"the adapter has weights for {name}, which cannot take adapter form here ({reason}). {_MERGE}"
            )
    counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    if shared := [name for name in pairs if counts[id(modules[name])] > 1]:
        raise ValueError(
            f"{some(shared)} is one layer under several names, of which PEFT has adapted only the first. {_MERGE}"
        )
    return {name: layer for name, layer in selection.targets.items() if name in pairs}


def _form(name: str, A: Tensor, B: Tensor, layer: nn.Module, config: dict[str, Any]) -> Adapter:
    """The form of one layer, checked against its shape."""
    out, into = weight_shape(layer)
    rank = _of_layer(name, config.get("rank_pattern"), config.get("r"))
    if layout_of(layer).kernel:
        raise ValueError(f"{name} is a convolution: LoRA checkpoints of convolutions cannot be read. {_MERGE}")
    if tuple(A.shape) != (rank, into) or tuple(B.shape) != (out, rank):
        raise ValueError(
            f"{name} of shape (out, in) = {(out, into)} with r={rank!r} needs lora_A {(rank, into)} and lora_B "
            f"{(out, rank)}; the adapter has {tuple(A.shape)} and {tuple(B.shape)}. Load it into the model that it was "
            "trained on."
        )
    if rank > min(out, into):
        raise ValueError(f"{name}: r={rank} exceeds min(out, in) = {min(out, into)}. {_MERGE}")
    alpha = _of_layer(name, config.get("alpha_pattern"), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not (0 < alpha < math.inf):
        raise ValueError(f"{name}: lora_alpha must be a number above 0, got {alpha!r}. {_MERGE}")
    return Adapter(rank, float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha))


def _of_layer(name: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """The value of the first pattern that matches all of the name, or what follows one of its dots."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(
                f"rank_pattern or alpha_pattern holds {pattern!r}, which is not a regular expression: {error}."
            ) from None
    return default


def _conversion(layer: nn.Module, form: Adapter, A: Tensor, B: Tensor) -> Conversion:
    conversion = prepare(layer, form)
    adapter = conversion.module
    with torch.no_grad():
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
    return conversion
