"""Configurations of tiny models: every size of an architecture's default configuration brought down, by its name.

Equal sizes stay equal, since a rule depends on nothing but a field's name and value: a projector fits both its sides
without being known. Fields that a configuration derives from others are left to it.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep.own_sizes import CONFIGS

WIDTH, HEADS, VOCAB = 64, 4, 128


@dataclasses.dataclass(frozen=True)
class Variant:
    """How far a configuration is shrunk: the first of :data:`VARIANTS` that gives a model which runs is taken.

    Attributes:
        layers: Layers that are left; None for all, where a pattern over the layers must be whole.
        grouped: Whether keys and values have fewer heads than queries; some architectures set them equal.
        images, widths: Whether images and widths are brought down; some networks fit together at their own alone.
        text_only: Whether the images and sounds of a model that takes text are left out.
    """

    layers: int | None = 2
    grouped: bool = True
    images: bool = True
    widths: bool = True
    text_only: bool = False


VARIANTS = (
    Variant(),
    Variant(grouped=False),
    Variant(layers=8),
    Variant(layers=None),
    Variant(layers=None, grouped=False),
    Variant(text_only=True),
    Variant(grouped=False, text_only=True),
    Variant(layers=None, grouped=False, text_only=True),
    Variant(images=False),
    Variant(widths=False),
    Variant(widths=False, images=False),
)


def _most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _power(limit: int) -> Callable[[int], int]:
    """The largest power of two that is neither above the limit nor above the value: such sizes divide each other."""
    return lambda value: 1 << (min(value, limit).bit_length() - 1) if value > 8 or limit <= 8 else value


# The first rule whose pattern is found in a field's name decides what becomes of its whole numbers; the others stay.
RULES: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"type_vocab|kernel|stride|sampling|num_channels|patch_size|factor|temporal|resolution|chunk|mel_bins|"
         r"_id$|_ids$|_index$|seed|dilation|ratio|loss|cost|weight|freq|max_depth|num_labels|window|merge|"
         r"feature_levels|num_stages|interval|period|offset|every|step", lambda value: value),
        (r"pos_feats", _most(WIDTH // 2)),
        (r"vocab|codebook_size|num_embeddings|bins|buckets", _most(VOCAB)),
        (r"(key_value|kv|key|global)_heads|n_groups$|query_groups", _power(2)),
        (r"mamba_(n|num)_heads|^(n_)?ssm_heads", _most(8)),
        (r"heads$|n_head$", _power(HEADS)),
        (r"head_dim|head_size|rotary_dim|d_kv|kv_channels|d_head|_nope_|dt_rank|lora_rank|"
         r"d_state|state_size|rank$", _most(16)),
        (r"num_groups|_groups$", _power(4)),
        (r"first_k_dense", _most(1)),
        (r"depths|num_layers_per|layers_to|_per_stage", _most(1)),
        (r"layers?$|depth$|_blocks$|^num_blocks|n_layers?$|block_repeats", _most(2)),
        (r"n_group|topk_group|shared_expert", _most(1)),
        (r"per_tok|top_?k|experts_per|moe_k", _most(2)),
        (r"experts?$|experts_num|num_experts|n_routed", _most(4)),
        (r"max_.*position|n_positions|n_ctx|context_length|max_.*len|seq_len|seq_length|max_source|max_target",
         _most(128)),
        (r"num_quer|query_tokens|num_latents|num_tokens|num_proposals", _most(8)),
        (r"num_frames|n_frames|frames_per", _most(2)),
        (r"position_embeddings", _most(16)),
        (r"intermediate|ffn|inner|mlp_dim|d_ff|feedforward|mlp_hidden|_mlp_", _power(2 * WIDTH)),
        (r"hidden|dim|size|width|channels|features|embd|d_model|units|planes|filters|embed", _power(WIDTH)),
    )
)  # fmt: skip
_GROUPED = next(p for p, _ in RULES if p.search("num_key_value_heads"))
_LAYERS = next(p for p, _ in RULES if p.search("num_hidden_layers"))
_WIDTHS = {
    next(p for p, _ in RULES if p.search(name))
    for name in ("num_key_value_heads", "mamba_n_heads", "num_attention_heads", "head_dim", "intermediate_size",
                 "hidden_size", "num_groups")
}  # fmt: skip
_TOKEN = re.compile(r"(token(_id)?|token_index|_token_ids?|(bos|eos|pad|cls|sep|mask)(_id|_index)|_idx)$")
_IMAGE = re.compile(r"(image|img|input|pretrain_img|pretrain_image)_size$|^crop_size$")


def tiny_config(model_type: str, variant: Variant = VARIANTS[0]) -> PretrainedConfig:
    """The default configuration of a model type at sizes at which a model takes milliseconds.

    Raises:
        Exception: What the configuration's own class raises, where it does not take these sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    return _Shrinking(variant).tiny(cls, cls(**CONFIGS.get(model_type, {}).get("base", {})), {})


class _Shrinking:
    """One pass over a configuration and those inside it; a placeholder token has one number in all of them."""

    def __init__(self, variant: Variant):
        self.variant, self.tokens = variant, {}

    def tiny(self, cls: type[PretrainedConfig], full: PretrainedConfig, given: dict[str, Any]) -> PretrainedConfig:
        """The tiny counterpart of a configuration; ``given`` are the values that its parent has set."""
        values = {}
        for field in dataclasses.fields(cls):
            value = vars(full).get(field.name)
            if field.name.startswith("_") or not field.init or field.name in _LEFT or value is None:
                continue
            if isinstance(value, PretrainedConfig):
                values[field.name] = self.tiny(type(value), value, _set_by_parent(value))
            elif field.name in given or _default(field) is not None or _is_rope(value):
                values[field.name] = self.shrunk(field.name, value, full)
        values |= {name: value for name, value in CONFIGS.get(cls.model_type, {}).items() if name != "base"}
        config = cls(**values)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        _same_outputs(full, config)
        return config

    def shrunk(self, name: str, value: Any, config: PretrainedConfig) -> Any:
        """One value at its tiny size."""
        if isinstance(value, (list, tuple)):
            if all(isinstance(v, str) for v in value):
                whole = self.variant.layers is None or not name.endswith("layer_types")
                return value if whole else value[: self.variant.layers]
            return type(value)(self.shrunk(name, v, config) for v in value)
        if _is_rope(value):
            return _shrunk_rope(value) if self.variant.widths else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            return value
        if _TOKEN.search(name):
            return value if value < VOCAB - 32 else self.tokens.setdefault(name, VOCAB - 1 - len(self.tokens))
        if _IMAGE.search(name):
            return _image_size(value, getattr(config, "patch_size", None)) if self.variant.images else value
        return self._by_rule(name, value)

    def _by_rule(self, name: str, value: int) -> int:
        pattern, rule = next(((p, r) for p, r in RULES if p.search(name)), (None, None))
        if rule is None or (pattern in _WIDTHS and not self.variant.widths):
            return value
        if pattern is _LAYERS:
            return value if self.variant.layers is None else min(value, self.variant.layers)
        if pattern is _GROUPED and not self.variant.grouped:
            return min(value, HEADS)
        return rule(value)


def _same_outputs(full: PretrainedConfig, config: PretrainedConfig) -> None:
    """A backbone gives as many maps as before: those of the same stages, or the last ones of the fewer it has."""
    indices = list(getattr(full, "out_indices", None) or [])
    stages = len(getattr(config, "stage_names", None) or [])
    if indices and len(indices) <= stages and isinstance(config, BackboneConfigMixin):
        fits = max(indices) < stages
        wanted = indices if fits else list(range(stages - len(indices), stages))
        config.set_output_features_output_indices(out_features=None, out_indices=wanted)


_LEFT = {"id2label", "label2id", "dtype", "architectures", "per_layer_config", "use_cache"}


def _is_rope(value: Any) -> bool:
    return isinstance(value, dict) and "rope_theta" in value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _set_by_parent(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a sub-configuration in which it differs from its class."""
    try:
        plain = vars(type(config)())
    except Exception:
        return dict(vars(config))
    return {name: value for name, value in vars(config).items() if plain.get(name) != value}


def _shrunk_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary dimensions add up to half of those of a head that rotate."""
    half = int(8 * (parameters.get("partial_rotary_factor") or 1.0))
    count = len(parameters.get("mrope_section") or (0, 0, 0))
    share = half // count
    return parameters | {"mrope_section": [half - share * (count - 1), *[share] * (count - 1)]}


def _image_size(size: int, patch: Any) -> int:
    """A few patches, and no less than 32 pixels."""
    patch = patch if isinstance(patch, int) and patch > 0 else 16
    return min(size, patch * max(2, -(-32 // patch)))
