"""What the rules of shrinking and of inputs do not reach, by model type.

``CONFIGS``: fields of the tiny configuration (``base``: of the full one that is shrunk). ``INPUTS``: see
:mod:`hf_drt.sweep.inputs`.
"""

from typing import Any

import torch

_CHAMELEON = {"<image>": 120} | {
    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": 128 + code for code in range(128)
}
_EMU = {"<image>": 120, "<|extra_200|>": 121} | {f"<|visual token {code:06}|>": 128 + code for code in range(128)}
_HEAD = {"head_dim": 16}
_RESNET = {
    "base": {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    },
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}
_TINY_VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 128},  # the width that ends the image network
    "align_vision_model": {"depth_coefficient": 1.0, "initializer_range": 0.5},
    "autoformer": _SERIES,
    "blip-2": {"image_token_index": 120},
    "chameleon": {"vocab_size": 256, "vocabulary_map": _CHAMELEON},
    "chmv2": {
        "backbone_config": _TINY_VIT | {
            "model_type": "dinov3_vit", "image_size": 32, "patch_size": 16, "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4], "key_bias": True, "return_class_token": True,
        },
        "post_process_channels": [16, 32, 64, 64],
    },
    "clap_audio_model": {
        "spec_size": 64, "window_size": 2, "num_mel_bins": 32, "patch_embeds_hidden_size": 16, "hidden_size": 128,
    },
    "clvp_decoder": {"decoder_fixing_codes": [83, 45, 45, 100]},
    "clvp_encoder": {"num_attention_heads": 2},  # 32 numbers of a head rotate at least
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [4, 2, 2]}}},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64], "global_attn_indexes": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _RESNET,
    "depth_pro": {
        "patch_size": 16, "intermediate_hook_ids": [1, 0], "merge_padding_value": 1,
    } | dict.fromkeys(
        ("image_model_config", "patch_model_config", "fov_model_config"),
        _TINY_VIT | {"model_type": "dinov2", "image_size": 16, "patch_size": 4},
    ),
    "detr": _RESNET,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {
        "num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"], "index_topk": 4,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4},
    "emu3": {"vocabulary_map": _EMU},
    "emu3_text_model": {"vocab_size": 256},
    "emu3_vqgan": {"hidden_size": 256},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "glm5_next_text": {
        "num_key_value_heads": 4, "layer_types": ["linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse"], "index_topk": 4, "index_kpool": 2,
    },
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 0, 1, 1],
        "image_grid_pinpoints": [[64, 64]],
    },
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl_text": _HEAD,
    "idefics": {
        "freeze_text_layers": False, "freeze_vision_layers": False, "alpha_initializer": "ones", "use_resampler": True,
    },
    "idefics_perciever": {"resampler_n_latents": 4},
    "informer": _SERIES,
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 3},
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "led": {"attention_window": 16, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lilt": {"hidden_size": 96},  # six coordinates share it
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "minicpm_ocr": {"image_token_id": 120, "insert_layer_id": 0, "downsample_mode": "16x"},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6": {"image_token_id": 120, "insert_layer_id": 0},
    "minicpmv4_7": {"image_token_id": 120, "insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
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


def _rows_and_columns(length: int) -> torch.Tensor:
    """Patches, each behind its row and column."""
    return torch.cat([torch.ones(2, 16, 2), torch.randn(2, 16, length)], dim=-1)


def _flattened(build: Any) -> dict[str, Any]:
    return {"flattened_patches": _rows_and_columns(768), "decoder_input_ids": build.decoder_input_ids()}


def _series(build: Any) -> dict[str, Any]:
    padding = torch.zeros(2, 64, dtype=torch.long)
    values = {"past_values": torch.randn(2, 64), "past_values_padding": padding}
    return values | ({"freq": padding[:, :1]} if "freq" in build.parameters else {})


def _task(build: Any) -> dict[str, Any]:
    return {"pixel_values": build.pixel_values(), "task_inputs": torch.randint(0, 100, (2, build.config.task_seq_len))}


def _square_patches(build: Any) -> dict[str, Any]:
    side = build.config.patch_size
    return {"pixel_values": build.patches().reshape(-1, 3, side, side)}


def _mel(build: Any) -> dict[str, Any]:
    """One channel of a spectrum, time first."""
    bins = build.config.audio_config.num_mel_bins
    return {"input_ids": build.input_ids(), "input_features": torch.randn(2, 1, 64, bins)}


def _scaled(build: Any) -> dict[str, Any]:
    """An image of which the smallest scale is one patch of the network."""
    side = int(build.config.patch_size / min(build.config.scaled_images_ratios))
    return {"pixel_values": torch.randn(2, 3, side, side)}


def _cross_attended(build: Any) -> dict[str, Any]:
    """One image a row, which all tokens attend to."""
    mask = {"image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long)}
    return mask | {"input_ids": build.input_ids(), "pixel_values": build.pixel_values()[:, None]}


def _frames_queried(build: Any) -> dict[str, Any]:
    """Each of two frames becomes as many tokens as there are queries."""
    build.counts = {"frames": 2, "video": 4 * build.config.num_query_tokens}
    return {name: getattr(build, name)() for name in ("pixel_values", "input_ids", "attention_mask")}


def _latent_queried(build: Any) -> dict[str, Any]:
    """The first tokens are the places of an image."""
    places = torch.arange(8).expand(2, -1) < build.config.latent_query_num
    mask = {"image_embeds_position_mask": places.long()}
    if "flattened_patches" in build.parameters:
        image = {"flattened_patches": _rows_and_columns(build.config.vision_config.patch_embed_hidden_size)}
    else:
        image = {"pixel_values": build.pixel_values()}
    return mask | image | {name: getattr(build, name)() for name in ("input_ids", "attention_mask")}


def _marked(build: Any) -> dict[str, Any]:
    """One row of two questions, of two and three options."""
    questions = {"marks": [[4, 7]], "num_options": [[2, 3]], "question_type_ids": [[0, 1]]}
    return {"input_ids": build.input_ids()[:1]} | {name: torch.tensor(value) for name, value in questions.items()}


def _packed(build: Any) -> dict[str, Any]:
    """Two images of 4 x 4 patches side by side in one row of patches."""
    side = build.config.patch_size
    return {"pixel_values": torch.randn(1, 3, side, 32 * side), "target_sizes": torch.tensor([[4, 4]] * 2)}


def _packed_and_text(build: Any) -> dict[str, Any]:
    """Each row has an image of one token, behind a token of text."""
    build.counts = {"image": 2}
    names = {"input_ids", "attention_mask", "mm_token_type_ids"} & build.parameters
    return _packed(build) | {name: getattr(build, name)().roll(1, dims=1) for name in sorted(names)}


def _image_and_sound(build: Any) -> dict[str, Any]:
    """Images of four tokens, and sounds of 32 frames that become four."""
    build.counts = {"image": 8, "audio": 8}
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    bins = build.config.audio_config.feature_size
    sound = {"input_features": torch.randn(2, bins, 32), "chunk_sample_lengths": torch.tensor([32 * 160] * 2)}
    return sound | {name: getattr(build, name)() for name in names}


def _folded(build: Any) -> dict[str, Any]:
    """Patches with time first and channels last, and frames of which each bin is a token."""
    vision, audio = build.config.vision_config, build.config.audio_config
    build.counts = {"image": 2, "audio": 6}
    patches = torch.randn(2, vision.temporal_patch_size, vision.patch_size, vision.patch_size, vision.num_channels)
    sound = torch.randint(0, audio.mel_vocab_size, (2, 3, audio.n_mel_bins))
    tokens = {name: getattr(build, name)() for name in ("input_ids", "attention_mask")}
    return tokens | {"pixel_values": patches, "audio_input_ids": sound}


def _tiled(build: Any) -> dict[str, Any]:
    """Each image whole, and as the one tile that it is cut into."""
    build.counts = {"frames": 2} | build.counts
    return {name: getattr(build, name)() for name in ("pixel_values", "input_ids", "attention_mask", "image_sizes")}


INPUTS: dict[str, Any] = {
    "audio-spectrogram-transformer": _spectrum,
    "blip-2": _queried,
    "blip_2_qformer": _encoded,
    "clap": _mel,
    "depth_pro": _scaled,
    "dots3_note": _image_and_sound,
    "gemma4_vision": _placed,
    "granite4_vision": _tiled,
    "idefics": _cross_attended,
    "inkling_mm_model": _folded,
    "instructblip": _queried,
    "instructblipvideo": _frames_queried,
    "jev": _marked,
    "kimi_k25_vision": _square_patches,
    "kosmos-2": _latent_queried,
    "kosmos-2.5": _latent_queried,
    "minicpm_ocr": _packed_and_text,
    "minicpm_ocr_vision": _packed,
    "minicpmv4_6": _packed_and_text,
    "minicpmv4_7": _packed_and_text,
    "minicpmv4_7_vision": _packed,
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
