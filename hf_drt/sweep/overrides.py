"""What the rules of shrinking and of inputs do not reach, by model type.

``CONFIGS``: fields of the tiny configuration (``base``: of the full one that is shrunk). ``INPUTS``: see
:mod:`hf_drt.sweep.inputs`.
"""

from typing import Any

import torch

_HEAD = {"head_dim": 16}
_RESNET = {
    "base": {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    },
}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}

CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "blip-2": {"image_token_index": 120},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl_text": _HEAD,
    "informer": _SERIES,
    "instructblip": {"image_token_index": 120},
    "led": {"attention_window": 16, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lilt": {"hidden_size": 96},  # six coordinates share it
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "ministral": _HEAD,
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "sam2_hiera_det_model": {
        "hidden_size": 32, "embed_dim_per_stage": [32, 64, 128, 256], "blocks_per_stage": [1, 2, 2, 2],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [4], "image_size": [64, 64],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [256, 128, 64, 32], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "seggpt": {"image_size": [64, 32]},
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 32, 32]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


def _video(build: Any) -> dict[str, Any]:
    return {"pixel_values_videos": build.pixel_values_videos()}


def _queried(build: Any) -> dict[str, Any]:
    """An image becomes as many tokens as there are queries."""
    build.counts = {"image": 2 * build.config.num_query_tokens}
    return {name: getattr(build, name)() for name in ("pixel_values", "input_ids", "attention_mask")}


def _encoded(build: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(2, 8, build.config.encoder_hidden_size)}


def _spectrum(build: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, build.config.max_length, build.config.num_mel_bins)}


def _hidden_both(build: Any) -> dict[str, Any]:
    """The model without the networks before it, which take sound or text."""
    return {name: torch.randn(2, 8, build.config.hidden_size) for name in ("input_values", "decoder_input_values")}


def _sound_to_text(build: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 4000), "decoder_input_ids": build.decoder_input_ids()}


def _naflex(build: Any) -> dict[str, Any]:
    """Images as rows of 4 x 4 patches, some of which could be padding."""
    vision = getattr(build.config, "vision_config", build.config)
    images = {
        "pixel_values": torch.randn(2, 16, 3 * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }
    return images | ({"input_ids": build.input_ids()} if "input_ids" in build.parameters else {})


def _placed(build: Any) -> dict[str, Any]:
    """6 x 6 patches with their columns and rows."""
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, -1, -1).clone()
    return {"pixel_values": torch.rand(2, 36, 3 * build.config.patch_size**2), "pixel_position_ids": places}


def _prompted(build: Any) -> dict[str, Any]:
    return {name: torch.randn(2, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _flattened(build: Any) -> dict[str, Any]:
    """Patches, each behind its row and column."""
    patches = torch.cat([torch.ones(2, 16, 2), torch.randn(2, 16, 768)], dim=-1)
    return {"flattened_patches": patches, "decoder_input_ids": build.decoder_input_ids()}


def _series(build: Any) -> dict[str, Any]:
    padding = torch.zeros(2, 64, dtype=torch.long)
    values = {"past_values": torch.randn(2, 64), "past_values_padding": padding}
    return values | ({"freq": padding[:, :1]} if "freq" in build.parameters else {})


def _task(build: Any) -> dict[str, Any]:
    return {"pixel_values": build.pixel_values(), "task_inputs": torch.randint(0, 100, (2, build.config.task_seq_len))}


def _square_patches(build: Any) -> dict[str, Any]:
    side = build.config.patch_size
    return {"pixel_values": build.patches().reshape(-1, 3, side, side)}


INPUTS: dict[str, Any] = {
    "audio-spectrogram-transformer": _spectrum,
    "blip-2": _queried,
    "blip_2_qformer": _encoded,
    "gemma4_vision": _placed,
    "instructblip": _queried,
    "kimi_k25_vision": _square_patches,
    "oneformer": _task,
    "pix2struct": _flattened,
    "seggpt": _prompted,
    "siglip2": _naflex,
    "siglip2_vision_model": _naflex,
    "speech-encoder-decoder": _sound_to_text,
    "speecht5": _hidden_both,
    "timesfm": _series,
    "timesfm2_5": _series,
    "videomt": _video,
    "videoprism_vision_model": _video,
}
NEVER: dict[str, tuple[str, ...]] = {}
