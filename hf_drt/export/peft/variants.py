"""What the settings of a LoRA checkpoint make of ``W + s B A``, and the way out where it is something else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MERGE = "Merge it in PEFT (merge_and_unload), and start from the dense model."

# Fields of adapter_config.json that are read, or that leave what the weights compute as it is.
PLAIN_FIELDS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save",
    "init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
# Starts that leave the base as published, and those that do not, some of which PEFT can convert as it saves.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
CONVERTIBLE_STARTS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class Variant:
    """A field that, where it is set, makes more of LoRA than ``W + s B A``, at least in training.

    Attributes:
        way_out: What to do with a checkpoint that is refused.
        plain: Whether the model with this value computes ``W + s B A`` in evaluation; such a checkpoint is read.
        unused: Name of the tensors that only training needs.
    """

    way_out: str = MERGE
    plain: Callable[[Any], bool] = lambda value: False
    unused: str | None = None


def _always(value: Any) -> bool:
    return True


# Of PEFT 0.21; every other field of a later release that is set is refused.
VARIANTS = {
    "use_dora": Variant(),
    "kasa_config": Variant(),
    "trainable_token_indices": Variant(),
    "megatron_config": Variant(),
    "velora_config": Variant(plain=_always, unused="lora_velora_embed"),
    "monteclora_config": Variant(plain=_always, unused="lora_monteclora_sampler"),
    "use_qalora": Variant(
        "PEFT has no way to merge it over quantized layers, whose input it averages in groups. Use it in PEFT.",
        plain=_always,
    ),
    "target_parameters": Variant(plain=_always),
    "use_bdlora": Variant(plain=lambda value: isinstance(value, dict) and value.get("nblocks", 1) == 1),
    "alora_invocation_tokens": Variant(
        "It acts on what follows the invocation tokens alone, so that no dense model computes it, and PEFT refuses to "
        "merge it. Use it in PEFT, or train it without alora_invocation_tokens."
    ),
    "arrow_config": Variant(
        "It mixes adapters anew for every token, so that no dense model computes it, and PEFT refuses to merge it. "
        "Load one of the adapters that it was made from."
    ),
    "lora_bias": Variant(
        "PEFT merges it (merge_and_unload) where the layers have biases. Where they have none, give every base_layer "
        "one of zeros first: base_layer.bias = torch.nn.Parameter(torch.zeros(base_layer.out_features))."
    ),
    "layer_replication": Variant(
        "Before you merge it in PEFT (merge_and_unload), give every base_layer a weight of its own (base_layer.weight "
        "= torch.nn.Parameter(base_layer.weight.detach().clone())): copies of a layer share one, to which PEFT would "
        "add what each has learned."
    ),
}


def check_variants(source: Any, config: dict[str, Any]) -> None:
    """Refuse what is more than ``W + s B A`` in evaluation.

    Raises:
        ValueError: With the field and its value, and the way out.
    """
    for field, value in config.items():
        variant = VARIANTS.get(field, Variant())
        if _is_set(field, value) and not variant.plain(value):
            raise ValueError(f"{source} sets {field}={value!r}, which is more than W + s B A. {variant.way_out}")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        merge = "merge it in PEFT (merge_and_unload)"
        convert = "convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion), or "
        way_out = convert + merge if str(start).startswith(CONVERTIBLE_STARTS) else merge
        raise ValueError(
            f"{source} has init_lora_weights={start!r}, which changes W before training, so that the adapter does not "
            f"fit the published base. {way_out[0].upper()}{way_out[1:]}."
        )


def without_unused(config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors that the model needs in evaluation."""
    unused = {
        variant.unused for field, variant in VARIANTS.items() if variant.unused and _is_set(field, config.get(field))
    }
    return {key: tensor for key, tensor in tensors.items() if not unused & set(key.split("."))}


def _is_set(field: str, value: Any) -> bool:
    """PEFT takes an empty mapping for a variant with its defaults."""
    return field not in PLAIN_FIELDS and (bool(value) or (field in VARIANTS and isinstance(value, dict)))
