"""What the rules of shrinking do not reach: fields of the tiny configuration, by model type.

``base`` holds fields of the full configuration that is shrunk.
"""

from typing import Any

_CHAMELEON = {"<image>": 120} | {
    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": 128 + code for code in range(128)
}
_EMU = {"<image>": 120, "<|extra_200|>": 121} | {f"<|visual token {code:06}|>": 128 + code for code in range(128)}
_HEAD = {"head_dim": 16}
_IMAGE_64 = {"image_size": 64}
_SPANS = {"longratio": 7, "midratio": 5, "shortratio": 3}
_INTRACLASS = {  # kernel, stride, padding
    "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    | {f"vertical_long_to_small_conv_{span}": [[k, 1], 1, [k // 2, 0]] for span, k in _SPANS.items()}
    | {f"horizontal_small_to_long_conv_{span}": [[1, k], 1, [0, k // 2]] for span, k in _SPANS.items()}
    | {f"symmetric_conv_long_{span}": [k, 1, k // 2] for span, k in _SPANS.items()},
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
_LCNET = {  # each block: kernel, channels in and out, stride, squeeze and excitation
    "model_type": "pp_lcnet_v4", "stem_channels": [3, 16, 32], "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "block_configs": [
        [[3, 32, 32, 1, True]],
        [[3, 32, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 64, 2, False], [3, 64, 64, 1, True]],
        [[3, 64, 64, 2, False], [3, 64, 64, 1, True]],
    ],
}  # fmt: skip
_RESNET = {
    "base": {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    },
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}
_SHORT_CODEC = {
    "num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "layer_scale_init_value": 1.0,
}  # fmt: skip
_TIMM_EVA = {
    "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
    "model_args": {
        "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "img_size": [56, 56], "global_pool": "",
        "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4],
    },
}  # fmt: skip
_TINY_VIT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 128},  # the width that ends the image network
    "align_vision_model": {"depth_coefficient": 1.0, "initializer_range": 0.5},
    "apertus1p5": {
        "image_token_id": 120, "audio_token_id": 121, "image_token_offset": 128, "audio_token_offset": 256,
    },
    "apertus1p5_text": {"vocab_size": 384},
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
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {
        "num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"], "index_topk": 4,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4},
    "edgetam_prompt_encoder": _IMAGE_64,
    "edgetam_video": _IMAGE_64 | {
        "memory_attention_rope_feat_sizes": [4, 4], "perceiver_resampler_attention_head_dim": 64,
        "perceiver_resampler_num_attention_heads": 1, "perceiver_resampler_num_latents_2d": 4,
        "memory_attention_rope_k_sizes": [2, 2],
    },
    "edgetam_video_prompt_encoder": _IMAGE_64,
    "edgetam_vision_model": {
        "backbone_config": {
            "model_type": "timm_wrapper", "architecture": "repvit_m1",
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}, "num_classes": 2,
        },
        "backbone_channel_list": [384, 192, 96, 48], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "emu3": {"vocabulary_map": _EMU},
    "emu3_text_model": {"vocab_size": 256},
    "emu3_vqgan": {"hidden_size": 256},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fast_vlm": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "resnet10t", "hidden_size": 512, "do_pooling": True,
        },
    },
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4, "projector_hidden_size": 64,
        },
    },
    "gemma4_assistant": {
        "base": {
            "text_config": {
                "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
                "num_hidden_layers": 6, "num_kv_shared_layers": 6,
            },
        },
    },
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
    "llama4_vision_model": {"image_size": 56, "intermediate_size": 256},
    "lw_detr_vit": {"image_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "minicpm_ocr": {"image_token_id": 120, "insert_layer_id": 0, "downsample_mode": "16x"},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6": {"image_token_id": 120, "insert_layer_id": 0},
    "minicpmv4_7": {"image_token_id": 120, "insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "ministral": _HEAD,
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer_assistant": {"target_layer_ids": [1, 2]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "neucodec": {"quantization_dim": 128},
    "omdet-turbo": {
        "backbone_config": {
            "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1],
            "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [32, 64, 64], "image_size": 64, "apply_layernorm_after_vision_backbone": False,
    },
    "pe_video_encoder": {
        "vision_config": _TIMM_EVA
        | {"num_classes": 32, "model_args": _TIMM_EVA["model_args"] | {"global_pool": "map"}},
    },
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2},
    "perception_lm": {"base": {"vision_config": _TIMM_EVA}},
    "pp_doclayout_v2": {
        "class_thresholds": [0.0] * 20, "class_order": list(range(20)),
        "reading_order_config": _TINY_VIT | {"coordinate_size": 16, "shape_size": 16},
    },
    "pp_ocrv5_server_det": _INTRACLASS,
    "pp_ocrv6_medium_det": _INTRACLASS | {"backbone_config": _LCNET},
    "pp_ocrv6_small_det": {"backbone_config": _LCNET, "layer_list_out_channels": [32, 32, 64, 64]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 100},
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [2, 4], "local_attn_chunk_length": 4, "hash_seed": 0,
        "lsh_attn_chunk_length": 4, "num_buckets": 2, "attn_layers": ["local", "lsh"], "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "rf_detr_dinov2": {"image_size": 56},
    "sam2_hiera_det_model": {
        "hidden_size": 32, "embed_dim_per_stage": [32, 64, 128, 256], "blocks_per_stage": [1, 2, 2, 2],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [4], "image_size": [64, 64],
    },
    "sam2_prompt_encoder": _IMAGE_64,
    "sam2_video": _IMAGE_64 | {"memory_attention_rope_feat_sizes": [4, 4]},
    "sam2_video_prompt_encoder": _IMAGE_64,
    "sam2_vision_model": {
        "backbone_channel_list": [256, 128, 64, 32], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam3_tracker_video": {"image_size": 42, "memory_attention_rope_feat_sizes": [3, 3]},
    "sam3_tracker_video_prompt_encoder": {"image_size": 42},
    "sam3_video": {"score_threshold_detection": 0.0, "new_det_thresh": 0.0, "det_nms_thresh": 1.0},
    "sam3_vision_model": {"backbone_feature_sizes": [[12, 12], [6, 6], [3, 3]]},
    "seggpt": {"image_size": [64, 32]},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 3, "no_token_index": 4},
    "step3p7": {"base": {"text_config": {"model_type": "step3p5", "sliding_window": 64}}},
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
    "timm_backbone": {"backbone": "resnet10t", "out_indices": [-1]},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64, "num_frames": 2},
    "vibevoice_acoustic_tokenizer": _SHORT_CODEC,
    "vibevoice_acoustic_tokenizer_decoder": _SHORT_CODEC,
    "vibevoice_acoustic_tokenizer_encoder": _SHORT_CODEC,
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 32, 32]},
    "xcodec2": {"quantization_dim": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
