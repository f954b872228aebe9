"""PEFT -> adapter form."""

import json
import logging
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.checkpoint import declare
from hf_drt.export.peft.files import CONFIG_NAME, WEIGHTS_NAME, grouped, local_folder, read_weights
from hf_drt.export.peft.patterns import broken_by_sorting, layer_alpha, layer_rank
from hf_drt.export.peft.variants import MERGE, VARIANTS, check_variants, without_unused
from hf_drt.forms import Adapter, Conversion, LowRankLinear, form_of, layout_of, prepare, weight_shape
from hf_drt.messages import some
from hf_drt.targets import find_targets, split_attention
from hf_drt.transition import exchange_layers

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_peft_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    revision: str | None = None,
    blocks: list[str] | None = None,
    ignore_source: list[str] | None = None,
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
        blocks, ignore_source: As in the run that trained the adapter (:class:`hf_drt.DRTConfig`).

    Returns:
        The form of every adapted layer, by name.

    Raises:
        ValueError: The checkpoint is incomplete or no plain LoRA, or does not fit the model, which is left as it was.
        HalfwayError: Memory has run out after the first layer had changed: the model is of no use any more.
    """
    folder = local_folder(folder, revision)
    config = _read_config(folder)
    if low_rank := [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        raise ValueError(
            f"{some(low_rank)} is in form {form_of(model.get_submodule(low_rank[0]))} already. Load the adapter into "
            "the dense model that it was trained on."
        )
    pairs, others = grouped(folder / WEIGHTS_NAME, without_unused(config, read_weights(folder)))
    _check_others(folder / WEIGHTS_NAME, others, model)
    _check_parameters(folder / CONFIG_NAME, config, model, pairs)
    layers = _layers(model, pairs, blocks=blocks, ignore_source=ignore_source)
    forms = _forms(folder / CONFIG_NAME, layers, pairs, config)
    split_attention(model, forms)
    exchange_layers(model, {name: (form, partial(_conversion, form, *pairs[name])) for name, form in forms.items()})
    declare(model)
    model.load_state_dict(others, strict=False)  # which knows of attention that has been split
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
        raise ValueError(f"{path} describes an adapter of type {kind!r}; only LORA is W + s B A. {MERGE}")
    check_variants(path, config)
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
            f"embeddings or convolutions, that cannot be loaded. {MERGE}"
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


def _layers(model: nn.Module, pairs: dict[str, Any], **chosen: list[str] | None) -> dict[str, nn.Module]:
    """The adapted layers, in the model's order; each has to be one that may change form."""
    selection = find_targets(model, **chosen)
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
                f"the adapter has weights for {name}, which cannot take adapter form here ({reason}). {MERGE}"
            )
    counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    if shared := [name for name in pairs if counts[id(modules[name])] > 1]:
        raise ValueError(
            f"{some(shared)} is one layer under several names, of which PEFT has adapted only the first. {MERGE}"
        )
    return {name: layer for name, layer in selection.targets.items() if name in pairs}


def _check_parameters(path: Path, config: dict[str, Any], model: nn.Module, pairs: dict[str, Any]) -> None:
    """What ``target_parameters`` has adapted must be matrices of shape (out, in), such as a linear layer's."""
    modules = dict(model.named_modules())
    matrices = [name for name in pairs if name in modules and isinstance(modules[name], nn.Linear)]
    others = [name for name in pairs if _is_parameter(name, config) and name not in matrices]
    if strange := others or [name for name in pairs if config.get("target_parameters") and name not in modules]:
        raise ValueError(
            f"{path} sets target_parameters={config['target_parameters']!r}, and {some(strange)} is not the weight of "
            f"an nn.Linear, of shape (out, in), so that its factors cannot be read. {MERGE}"
        )


def _is_parameter(name: str, config: dict[str, Any]) -> bool:
    """Whether PEFT has adapted the layer's weight by the parameter's name, which ends in one of those given."""
    targets = tuple(config.get("target_parameters") or ())
    return f".{name}.weight".endswith(tuple(f".{target}" for target in targets))


def _forms(
    path: Path, layers: dict[str, nn.Module], pairs: dict[str, tuple[Tensor, Tensor]], config: dict[str, Any]
) -> dict[str, Adapter]:
    """The form of every layer; a warning where the file's ranks are not those of its tensors."""
    keys = {name: f"{name}.weight" if _is_parameter(name, config) else name for name in layers}  # what patterns match
    forms = {name: _form(name, keys[name], *pairs[name], layer, config) for name, layer in layers.items()}
    if broken := [name for name, form in forms.items() if broken_by_sorting(keys[name], config, form.rank)]:
        logger.warning(
            "%s: for %s rank_pattern gives another rank than the tensors have. PEFT sorts the patterns as it saves, "
            "and the first that matches decides, so that it cannot load this file itself. The ranks are read from the "
            "tensors.",
            path,
            some(broken),
        )
    return forms


def _form(name: str, key: str, A: Tensor, B: Tensor, layer: nn.Module, config: dict[str, Any]) -> Adapter:
    """The form of one layer, whose patterns match ``key``, checked against its shape."""
    out, into = weight_shape(layer)
    rank = layer_rank(key, config, len(A))
    if layout_of(layer).kernel:
        raise ValueError(f"{name} is a convolution: LoRA checkpoints of convolutions cannot be read. {MERGE}")
    if config.get("use_qalora") and A.shape[1] < into:
        raise ValueError(
            f"{name} has lora_A of shape {tuple(A.shape)} with use_qalora=True, in place of {(rank, into)}. "
            f"{VARIANTS['use_qalora'].way_out}"
        )
    if tuple(A.shape) != (rank, into) or tuple(B.shape) != (out, rank):
        raise ValueError(
            f"{name} of shape (out, in) = {(out, into)} with r={rank!r} needs lora_A {(rank, into)} and lora_B "
            f"{(out, rank)}; the adapter has {tuple(A.shape)} and {tuple(B.shape)}. Load it into the model that it was "
            "trained on."
        )
    if rank > min(out, into):
        raise ValueError(f"{name}: r={rank} exceeds min(out, in) = {min(out, into)}. {MERGE}")
    alpha = layer_alpha(key, config)
    if not isinstance(alpha, (int, float)) or not (0 < alpha < math.inf):
        raise ValueError(f"{name}: lora_alpha must be a number above 0, got {alpha!r}. {MERGE}")
    return Adapter(rank, float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha))


def _conversion(form: Adapter, A: Tensor, B: Tensor, layer: nn.Module) -> Conversion:
    conversion = prepare(layer, form)
    adapter = conversion.module
    with torch.no_grad():
        adapter.get_parameter("lora_A").copy_(A)
        adapter.get_parameter("lora_B").copy_(B)
    return conversion
