"""Adapter form -> PEFT."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from hf_drt.checkpoint import undeclared
from hf_drt.engines import unwrapped
from hf_drt.export.merge import low_rank_layers
from hf_drt.export.peft.files import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from hf_drt.forms import AdapterLinear, LowRankLinear, in_one_dtype, stack_count
from hf_drt.messages import some

logger = logging.getLogger(__name__)


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
    after a dense or factored phase, or with another ``adapter_init`` than 'zero', it never is, and PEFT would give
    wrong outputs without an error. Whether it is cannot be told from here: when in doubt, write ``base_folder``, and
    publish that.

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


def write_adapter(
    model: nn.Module, folder: str | os.PathLike, base: str | None, state: dict[str, Tensor] | None = None
) -> None:
    """The two files of the adapter alone; the base is the caller's business. Arguments as in :func:`save_peft_adapter`.

    Args:
        state: The model's state dict where it has been gathered already, as of a sharded model.

    Raises:
        ValueError: As there.
    """
    adapters = check_adapters(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{layer}.lora_{key}.weight": weight.detach().contiguous()
        for layer, module in adapters.items()
        for key, weight in zip("AB", _lora_weights(layer, module, state), strict=True)
    }
    save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
    config = _lora_config(model, adapters, base)
    (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _lora_weights(name: str, module: AdapterLinear, state: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """``lora_A`` and ``lora_B`` as PEFT stores them: those of a convolution as a k x k and a 1x1 kernel."""
    A, B = (getattr(module, key) if state is None else state[f"{name}.{key}"] for key in ("lora_A", "lora_B"))
    if not module.layout.kernel:
        return A, B
    return module.layout.stored(A), B.reshape(*B.shape, *(1,) * len(module.stride))


def base_state_dict(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of the dense model that the adapters add to: their frozen W, and all other tensors as they are.

    Args:
        state: That of the model where it has been gathered already; may be empty on a process that gets none.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, module in low_rank_layers(model):
        if isinstance(module, AdapterLinear):
            tensors = {key: state.pop(f"{name}.{key}", None) for key in module.tensors}
            if (A := tensors["lora_A"]) is not None:
                held = {key: tensor for key, tensor in tensors.items() if tensor is not None}
                state[f"{name}.weight"] = in_one_dtype(held, A.dtype)["base"]
    return state


def check_adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapters by name, in a model that PEFT can express.

    Raises:
        ValueError: It cannot, as in :func:`save_peft_adapter`.
    """
    if isinstance(model, nn.DataParallel) or unwrapped(model) is not model:
        raise ValueError(
            f"{type(model).__name__} wraps the model, and its layers' names would not fit the base. Pass the model "
            "itself (model.module, model._orig_mod, or accelerator.unwrap_model(model))."
        )
    layers = dict(low_rank_layers(model))
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
    if foreign := [name for name, m in adapters.items() if not _is_lora(m)]:
        raise ValueError(
            f"{some(foreign)} has an adapter that PEFT does not have: its LoRA is of decomposition 'svd', "
            "and in convolutions without dilation and padded with zeros. Save the dense model in its place "
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


def _is_lora(module: LowRankLinear) -> bool:
    """Whether PEFT's LoRA computes what this adapter does."""
    plain = not module.layout.kernel or (module.padding_mode == "zeros" and all(step == 1 for step in module.dilation))
    return plain and module.form.product.two_matrices


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
            "hf_drt.export.base_state_dict(model) in your own way, and leave base_folder out."
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
    if inits := {module.form.init for module in adapters.values()} - {"zero"}:
        signs.append(f"adapter_init='{min(inits)}' has moved part of W from the base into the adapter")
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


def _most_frequent(values: Mapping[str, float]) -> float:
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
