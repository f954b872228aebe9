"""Layers in adapter form as a LoRA checkpoint of the PEFT library, and such a checkpoint as adapter form.

Both are ``W + s B A`` with the same order of operations. Only the two files of the format are read and written:
PEFT itself is not imported.
"""

import json
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_drt.declaration import declare, undeclared
from hf_drt.forms import (
    Adapter,
    AdapterLinear,
    Conversion,
    LowRankLinear,
    form_of,
    layout_of,
    prepare,
    stack_count,
    weight_shape,
)
from hf_drt.selection import find_targets
from hf_drt.surgery import Swap, replace
from hf_drt.wording import some

logger = logging.getLogger(__name__)

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PAIR_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
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


# ---- adapter form -> PEFT


def save_peft_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    base_model_name_or_path: str | None = None,
    *,
    base_folder: str | os.PathLike | None = None,
) -> None:
    """Write the layers in adapter form as a LoRA checkpoint: ``adapter_config.json``, ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained(base, folder)`` then computes what ``model`` does, bit for bit in float32; so does
    ``AutoModel...from_pretrained(folder)``, which finds the base by its name. (PEFT holds LoRA weights in float32 over
    a half-precision base, so there the results differ by rounding.) Ranks and alphas may differ between layers. The
    model stays as it is. With several processes, call it on one.

    **The adapter is worth nothing without its base.** The base must hold, exactly, the frozen W of every adapter and
    all other weights of this model: biases, norms, embeddings and heads, which dynamic-rank training trains along. A
    published model is that base only if nothing but ``lora_A`` and ``lora_B`` has been trained since it was loaded;
    after a dense or factored phase, or with ``adapter_init='principal'``, it never is, and PEFT would give wrong
    outputs without an error. Whether it is cannot be told from here: when in doubt, write ``base_folder``, and publish
    that.

    Args:
        model: With one or more layers in adapter form, the others dense.
        folder: Of the adapter; made if need be.
        base_model_name_or_path: What the adapter names as its base. Default: ``base_folder``, else the name that the
            model was loaded from.
        base_folder: Write the base there too, a dense model for plain ``from_pretrained``.

    Raises:
        ValueError: No layer is in adapter form, one is in factored form, or PEFT has no way to express the model.
    """
    adapters = check_adapters(model)
    _check_base_folder(model, folder, base_folder)
    name = base_model_name_or_path or (os.fspath(base_folder) if base_folder else _origin(model))
    if base_folder is None:
        _warn_of_the_base(model, adapters, name)
    else:
        with undeclared(model):
            model.save_pretrained(base_folder, state_dict=base_state_dict(model))
    write_adapter(model, folder, name)


def write_adapter(model: nn.Module, folder: str | os.PathLike, base: str | None) -> None:
    """The two files of the adapter alone; the base is the caller's business. Arguments as in :func:`save_peft_adapter`.

    Raises:
        ValueError: As there.
    """
    adapters = check_adapters(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{layer}.lora_{key}.weight": weight.detach().contiguous()
        for layer, module in adapters.items()
        for key, weight in zip("AB", _lora_weights(module), strict=True)
    }
    save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
    config = _lora_config(model, adapters, base)
    (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _lora_weights(module: AdapterLinear) -> tuple[Tensor, Tensor]:
    """``lora_A`` and ``lora_B`` as PEFT stores them: those of a convolution as a k x k and a 1x1 kernel."""
    if not module.layout.kernel:
        return module.lora_A, module.lora_B
    return module.layout.stored(module.lora_A), module.lora_B.reshape(*module.lora_B.shape, *(1,) * len(module.stride))


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the dense model that the adapters add to: their frozen W, and all other tensors as they are."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, AdapterLinear):
            continue
        for key in module.tensors:
            del state[f"{name}.{key}"]
        state[f"{name}.weight"] = module.base.detach()
    return state


def check_adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapters by name, in a model that PEFT can express.

    Raises:
        ValueError: It cannot, as in :func:`save_peft_adapter`.
    """
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} wraps the model, and its layers' names would not fit the base. Pass the model "
            "itself (model.module, model._orig_mod, or accelerator.unwrap_model(model))."
        )
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)}
    adapters = {name: m for name, m in layers.items() if isinstance(m, AdapterLinear)}
    if not adapters:
        raise ValueError(
            f"no layer of {type(model).__name__} is in adapter form ({len(layers)} are factored, the others dense), so "
            "there is no LoRA to write. Export after a phase 'adapter', such as that of "
            "schedule='factored@0 dense@40% adapter@80%'; save a model in other forms with export=dense or native."
        )
    if stacks := [name for name, m in layers.items() if stack_count(m) is not None]:
        raise ValueError(
            f"{some(stacks)} is of fused experts, whose adapters PEFT lays out in another way. Keep the experts dense "
            "(exclude=['experts']), or save the model with export=dense or native."
        )
    if factored := [name for name in layers if name not in adapters]:
        raise ValueError(
            f"{some(factored)} is in factored form, which PEFT does not have. Make such layers dense first: "
            "model.set_submodule(name, hf_drt.convert(model.get_submodule(name), hf_drt.Dense()).module)."
        )
    if foreign := [name for name, m in adapters.items() if m.layout.kernel and not _is_conv_of_peft(m)]:
        raise ValueError(
            f"{some(foreign)} is a convolution with an adapter that PEFT does not have: its LoRA is of decomposition "
            "'svd', without dilation and padded with zeros. Save the dense model in its place "
            "(hf_drt.dense_state_dict), or use export=native."
        )
    if misread := _taken_for_experts(model, list(adapters)):
        raise ValueError(
            f"{some(misread)} has the name of a projection of the experts, which transformers fuses into one tensor, "
            "so PEFT would look for it there and lose the adapter. Keep such layers dense (exclude=), or save the "
            "dense model in its place (hf_drt.dense_state_dict)."
        )
    counts = Counter(map(id, adapters.values()))
    if shared := [name for name, m in adapters.items() if counts[id(m)] > 1]:
        raise ValueError(
            f"{some(shared)} is one layer under several names, of which PEFT would adapt only the first. Save the "
            "dense model in its place (hf_drt.dense_state_dict)."
        )
    return adapters


def _is_conv_of_peft(module: nn.Module) -> bool:
    plain = module.padding_mode == "zeros" and all(step == 1 for step in module.dilation)
    return plain and module.form.decomposition == "svd"


def _taken_for_experts(model: nn.Module, names: list[str]) -> list[str]:
    """Layers that PEFT 0.21 renames as it adapts checkpoints of older mixtures of experts to fused ones."""
    fused = any(name.endswith("experts.gate_up_proj") and p.ndim == 3 for name, p in model.named_parameters())
    leaves = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    return [name for name in names if fused and name.rpartition(".")[2] in leaves]


def _check_base_folder(model: nn.Module, folder: str | os.PathLike, base_folder: str | os.PathLike | None) -> None:
    if base_folder is None:
        return
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"base_folder needs a transformers model; {type(model).__name__} has no save_pretrained. Save "
            "hf_drt.hub.peft.base_state_dict(model) in your own way, and leave base_folder out."
        )
    if Path(folder).resolve() == Path(base_folder).resolve():
        raise ValueError(
            f"folder and base_folder are both {os.fspath(folder)}; from_pretrained would find a model and an adapter "
            "there. Give the base a folder of its own."
        )


def _origin(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def _warn_of_the_base(model: nn.Module, adapters: dict[str, AdapterLinear], name: str | None) -> None:
    lora = {id(p) for m in adapters.values() for p in (m.lora_A, m.lora_B)}
    trained = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in lora]
    signs = [f"{len(trained)} other parameters are trainable: {some(trained)}"] if trained else []
    if any(module.form.init == "principal" for module in adapters.values()):
        signs.append("adapter_init='principal' has moved part of W from the base into the adapter")
    logger.warning(
        "the adapter is right only over a base with this model's frozen weights, biases, norms, embeddings and head, "
        "bit for bit. Whether %s holds them cannot be checked; %s. If it does not, PEFT will give wrong outputs "
        "without an error: pass base_folder= to write the base too.",
        f"'{name}'" if name else "the base you will load",
        "; ".join(signs) or "any dense or factored phase since it was loaded has changed them",
    )


def _lora_config(model: nn.Module, adapters: dict[str, AdapterLinear], name: str | None) -> dict[str, Any]:
    """``adapter_config.json``: the most frequent rank and alpha as the default, the others as anchored patterns."""
    ranks = {layer: module.form.rank for layer, module in adapters.items()}
    alphas = {layer: _whole(module.form.alpha) for layer, module in adapters.items()}
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(layer): r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(layer): a for layer, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": _target_modules(model, list(adapters)),
        # One flag for all layers: where they differ, PEFT corrects it per layer, with a warning.
        "fan_in_fan_out": any(module.layout.transposed for module in adapters.values()),
    }


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _most_frequent(values: dict[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _anchored(name: str) -> str:
    """PEFT also finds a pattern behind a dot of a longer name, unless it is anchored."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names; as one regular expression where PEFT's match by suffix would find other modules too."""
    suffixes, known = tuple(f".{name}" for name in names), set(names)
    if any(other.endswith(suffixes) and other not in known for other, _ in model.named_modules()):
        return "|".join(map(re.escape, names))
    return names


# ---- PEFT -> adapter form


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
    folder = _local_folder(folder, revision)
    config = _read_config(folder)
    if low_rank := [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        raise ValueError(
            f"{some(low_rank)} is in form {form_of(model.get_submodule(low_rank[0]))} already. Load the adapter into "
            "the dense model that it was trained on."
        )
    pairs, others = _grouped(folder / WEIGHTS_NAME, _read_weights(folder))
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


def _local_folder(folder: str | os.PathLike, revision: str | None) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(os.fspath(folder), revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(folder)} is no folder here, and could not be had from the Hub ({type(error).__name__}: "
            f"{error}). Give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or the name of a repository with them."
        ) from error
    return Path(found)


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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "Load adapter_model.bin in PEFT and save it again" if pickled else "Save the adapter again"
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}: the adapter is incomplete. {remedy}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Save the adapter again.") from None


def _grouped(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """``(A (r, in), B (out, r))`` by layer, and all other tensors of the file by their name in the model."""
    halves, others = {}, {}
    for key, tensor in tensors.items():
        if match := _PAIR_KEY.fullmatch(key):
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    if not halves:
        raise ValueError(f"{path} holds no LoRA weight ({PREFIX}<layer>.lora_A.weight): there is nothing to load.")
    if torn := [name for name, half in halves.items() if len(half) < 2]:
        raise ValueError(f"{path} is damaged: {some(torn)} has only one of lora_A and lora_B. Save the adapter again.")
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {some(bad)} holds inf or nan; that training has diverged. Use an earlier state.")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}, others


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
