"""Configurations of tiny models: every size of an architecture's default configuration brought down, by its name.

Equal sizes stay equal, since a rule depends on nothing but a field's name and value: a projector fits both its sides
without being known. Fields that a configuration derives from others are left to it.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_drt.sweep.overrides import CONFIGS

WIDTH, HEADS, VOCAB = 64, 4, 128


def _most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _power(limit: int) -> Callable[[int], int]:
    """The largest power of two that is neither above the limit nor above the value: such sizes divide each other."""
    return lambda value: 1 << (min(value, limit).bit_length() - 1)


# The first rule whose pattern is found in a field's name decides what becomes of its whole numbers; the others stay.
RULES: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"type_vocab|kernel|stride|sampling|num_channels|patch_size|factor|temporal|resolution|chunk|mel_bins|"
         r"_id$|_ids$|_index$|seed|dilation|ratio|loss|cost|weight|freq|max_depth|num_labels|window_layers|merge|"
         r"feature_levels|num_stages|interval|period|offset|every|step|num_groups", lambda value: value),
        (r"vocab|codebook_size|num_embeddings|bins|buckets", _most(VOCAB)),
        (r"(key_value|kv|key|global)_heads|n_groups$|query_groups", _power(2)),
        (r"mamba_(n|num)_heads|^(n_)?ssm_heads", _most(8)),
        (r"heads?$|^n_head|attention_heads|num_heads|heads_", _power(HEADS)),
        (r"head_dim|head_size|d_kv|kv_channels|d_head|_nope_|dt_rank|lora_rank|d_state|state_size|rank$", _most(16)),
        (r"first_k_dense", _most(1)),
        (r"depths|num_layers_per|layers_to|_per_stage", _most(1)),
        (r"layers?$|depth$|_blocks$|^num_blocks|n_layers?$|block_repeats", _most(2)),
        (r"per_tok|top_?k|experts_per|moe_k", _most(2)),
        (r"n_group|topk_group|shared_expert", _most(1)),
        (r"experts?$|experts_num|num_experts|n_routed", _most(4)),
        (r"max_.*position|n_positions|n_ctx|context_length|max_.*len|seq_len|seq_length|max_source|max_target",
         _most(128)),
        (r"num_quer|query_tokens|num_latents|num_tokens|num_proposals", _most(8)),
        (r"num_frames|n_frames|frames_per", _most(2)),
        (r"window", _most(16)),
        (r"position_embeddings", _most(16)),
        (r"intermediate|ffn|inner|mlp_dim|d_ff|feedforward|mlp_hidden|_mlp_", _power(2 * WIDTH)),
        (r"hidden|dim|size|width|channels|features|embd|d_model|units|planes|filters|embed", _power(WIDTH)),
    )
)  # fmt: skip
_TOKEN = re.compile(r"(token(_id)?|token_index|_token_ids?|(bos|eos|pad|cls|sep|mask)(_id|_index)|_idx)$")
_IMAGE = re.compile(r"(image|img|input|pretrain_img|pretrain_image)_size$|^crop_size$")


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of a model type at sizes at which a model takes milliseconds.

    Raises:
        Exception: What the configuration's own class raises, where it does not take these sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    return _tiny(cls, cls(**CONFIGS.get(model_type, {}).get("base", {})), {}, {})


def _tiny(
    cls: type[PretrainedConfig], full: PretrainedConfig, given: dict[str, Any], tokens: dict[str, int]
) -> PretrainedConfig:
    """The tiny counterpart of a configuration; ``given`` are the values that its parent has set."""
    overrides = CONFIGS.get(cls.model_type, {})
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(full, field.name, None)
        if field.name.startswith("_") or not field.init or isinstance(value, bool) or value is None:
            continue
        if isinstance(value, PretrainedConfig):
            values[field.name] = _tiny(type(value), value, _set_by_parent(value), tokens)
        elif field.name in given or _default(field) is not None:
            values[field.name] = _shrunk(field.name, value, full, tokens)
    values |= {name: value for name, value in overrides.items() if name != "base"}
    for name in ("id2label", "label2id", "dtype", "architectures", "per_layer_config"):
        values.pop(name, None)
    return cls(**values)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _set_by_parent(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a sub-configuration in which it differs from its class."""
    try:
        plain = type(config)()
    except Exception:
        return dict(vars(config))
    return {name: value for name, value in vars(config).items() if getattr(plain, name, None) != value}


def _shrunk(name: str, value: Any, config: PretrainedConfig, tokens: dict[str, int]) -> Any:
    if isinstance(value, (list, tuple)):
        if all(isinstance(v, str) for v in value):
            return value
        return type(value)(_shrunk(name, v, config, tokens) for v in value)
    if isinstance(value, dict):
        return _shrunk_rope(value) if "rope" in name else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if _TOKEN.search(name):
        return value if value < VOCAB - 32 else tokens.setdefault(name, VOCAB - 1 - len(tokens))
    if _IMAGE.search(name):
        return _image_size(value, getattr(config, "patch_size", None))
    return next((rule(value) for pattern, rule in RULES if pattern.search(name)), value)


def _shrunk_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary dimensions add up to half a head's."""
    if "mrope_section" not in parameters:
        return parameters
    count = len(parameters["mrope_section"])
    return parameters | {"mrope_section": [8 - 3 * (count - 1), *[3] * (count - 1)]}


def _image_size(size: int, patch: Any) -> int:
    """A few patches, and no less than 32 pixels."""
    patch = patch if isinstance(patch, int) and patch > 0 else 16
    return min(size, patch * max(2, -(-32 // patch)))
