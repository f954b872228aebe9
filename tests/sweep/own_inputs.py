"""What the rules of inputs do not reach: a function that makes the inputs of a model type.

It is given the :class:`tests.sweep.inputs.Builder`.
"""

import math
from importlib import import_module
from typing import Any

import torch


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


def _shared_states(build: Any) -> dict[str, Any]:
    """Hidden states of the model that is assisted, and its keys and values in each kind of layer."""
    text, states = build.config.text_config, {}
    for kind in ("full_attention", "sliding_attention"):
        layer = text.per_layer_config[text.layer_types.index(kind)]
        shape = (2, layer.num_key_value_heads, 8, layer.head_dim)
        states[kind] = (torch.randn(shape), torch.randn(shape))
    embeds = torch.randn(2, 1, 2 * build.config.backbone_hidden_size)
    return {"inputs_embeds": embeds, "shared_kv_states": states, "position_ids": torch.tensor([[8]])}


def _noise(build: Any) -> dict[str, Any]:
    """A block to denoise, behind the context that the other model gives."""
    config = build.config
    context = torch.randn(2, 8, config.hidden_size * len(config.target_layer_ids))
    return {"noise_embeds": torch.randn(2, config.block_size, config.hidden_size), "context_hidden_states": context}


def _robot(build: Any) -> dict[str, Any]:
    """Images of two cameras, a question, and embedded actions."""
    vision = build.config.vlm_config.vision_config
    build.counts = {"image": 4 * (vision.image_size // vision.patch_size) ** 2}
    token = build.config.vlm_config.image_token_id
    ids = torch.cat([torch.full((2, build.counts["image"] // 2), token), build._tokens()], dim=1)
    return {
        "action_embeds": torch.randn(2, 8, build.config.dit_config.hidden_size),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 2, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    }


def _prompt_and_canvas(build: Any) -> dict[str, Any]:
    return {"input_ids": build.input_ids(), "decoder_input_ids": build.decoder_input_ids()}


def _codes(build: Any) -> dict[str, Any]:
    """A text, and one token of each channel a step."""
    channels = build.config.decoder_config.num_channels
    return {"input_ids": build.input_ids(), "decoder_input_ids": torch.randint(3, 100, (2, 8, channels))}


def _text_and_codes(build: Any) -> dict[str, Any]:
    """A token of text and one of each codebook a step."""
    return {"input_ids": torch.randint(3, 100, (2, 8, build.config.num_codebooks + 1))}


def _codebooks(build: Any) -> dict[str, Any]:
    """A text, perhaps a melody, and a row of tokens for each codebook."""
    codes = torch.randint(3, 100, (2 * build.config.decoder.num_codebooks, 8))
    inputs = {"input_ids": build.input_ids(), "decoder_input_ids": codes}
    if "input_features" in build.parameters:
        inputs["input_features"] = torch.randn(2, 16, build.config.num_chroma)
    return inputs


def _stacked(build: Any) -> dict[str, Any]:
    """Frames of a spectrum, several of them stacked, and text where the model takes it."""
    audio = getattr(build.config, "audio_config", build.config)
    features = torch.randn(2, 16, audio.num_mel_bins * audio.num_stacked_frames)
    inputs = {"input_features": features, "input_features_mask": torch.ones(2, 16, dtype=torch.long)}
    return inputs | ({"input_ids": build.input_ids()} if "input_ids" in build.parameters else {})


def _wave_and_spectrum(build: Any) -> dict[str, Any]:
    """Twelve frames, as a wave and as a spectrum."""
    frame = math.prod(build.config.downsampling_ratios)
    bins = build.config.semantic_model_config.feature_projection_input_dim
    return {"input_values": torch.randn(2, 1, 12 * frame), "input_features": torch.randn(2, 12, bins)}


def _wave(build: Any) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, build.config.channels, 64)}


def _latents(build: Any) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, build.config.hidden_size, 16)}


def _image_codes(build: Any) -> dict[str, Any]:
    """Each image becomes a code for every 16 x 16 pixels."""
    build.counts = {"image": 32}
    images = {"pixel_values": torch.randn(2, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]] * 2)}
    return images | {name: getattr(build, name)() for name in ("input_ids", "attention_mask")}


def _masked_mel(build: Any) -> dict[str, Any]:
    """A spectrum of which the mask is true at padding."""
    mel = torch.randn(2, 64, build.config.input_feat_size)
    return {"audio_mel": mel, "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool)}


def _mel_128(build: Any) -> dict[str, Any]:
    mask = torch.ones(2, 64, dtype=torch.bool)
    return {"input_features": torch.randn(2, 64, 128), "input_features_mask": mask}


def _windowed_mel(build: Any) -> dict[str, Any]:
    """A spectrum of one window, time last."""
    frames = 2 * build.config.n_window
    mask = torch.ones(2, frames, dtype=torch.long)
    return {"input_features": torch.randn(2, build.config.num_mel_bins, frames), "input_features_mask": mask}


def _whole_tokens(build: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 2 * build.config.samples_per_token)}


def _unsampled(build: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1, 2 * build.config.hop_length), "sample": False}


def _unsampled_and_text(build: Any) -> dict[str, Any]:
    """Sounds of two tokens each, to which no noise is added."""
    build.counts = {"audio": 4}
    config = build.config
    length = 2 * (getattr(config, "audio_config", None) or config.acoustic_tokenizer_encoder_config).hop_length
    text = {name: getattr(build, name)() for name in {"input_ids", "attention_mask"} & build.parameters}
    sound = {"input_values": torch.randn(2, 1, length), "padding_mask": torch.ones(2, length, dtype=torch.bool)}
    return text | sound | {"sample": False}


def _clip(build: Any) -> dict[str, Any]:
    """Two frames of one video at the size of the prompt, and a text; the model's grids take one row only."""
    side = build.config.max_img_size
    texts = {name: getattr(build, name)()[:1] for name in ("input_ids", "attention_mask")}
    return texts | {"pixel_values": torch.randn(1, 2, 3, side, side)}


def _features(build: Any) -> dict[str, Any]:
    return {"inputs": torch.randn(2, 8, build.config.d_model)}


def _line(build: Any) -> dict[str, Any]:
    """Images of a line of text."""
    return {"pixel_values": torch.randn(2, 3, 96, 320)}


def _film(build: Any) -> dict[str, Any]:
    """Two frames, and the sound and the text that the model takes."""
    inputs = {"pixel_values_videos": torch.randn(2, 2, 3, 56, 56)}
    if "input_values" in build.parameters:
        inputs["input_values"] = torch.randn(2, 1, 16000)
    return inputs | ({"input_ids": build.input_ids()} if "input_ids" in build.parameters else {})


def _session(build: Any) -> dict[str, Any]:
    """A film of two frames with a point on the first, in the session that the model's own module has for it."""
    module = import_module(type(build.config).__module__.replace("configuration_", "modeling_"))
    session_class = next(getattr(module, name) for name in dir(module) if name.endswith("InferenceSession"))
    side = build.image_side()[0]
    session = session_class(
        video=torch.randn(2, 3, side, side), video_height=side, video_width=side, dtype=torch.float32
    )
    if hasattr(session, "add_prompt"):
        prompt = session.add_prompt("a word")
        session.prompt_input_ids[prompt] = torch.randint(3, 100, (1, 8))
        session.prompt_attention_masks[prompt] = torch.ones(1, 8, dtype=torch.long)
    else:
        labels = torch.ones(1, 1, 1, dtype=torch.int32)
        point = {"point_coords": torch.full((1, 1, 1, 2), side / 2.0), "point_labels": labels}
        session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
        session.obj_with_new_inputs = [1]
    return {"inference_session": session, "frame_idx": 0}


def _classes(build: Any) -> dict[str, Any]:
    """Two images, for each a task and two classes to look for."""
    texts = {"classes_input_ids": torch.randint(3, 100, (4, 8)), "tasks_input_ids": torch.randint(3, 100, (2, 8))}
    masks = {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in texts.items()}
    return texts | masks | {"pixel_values": build.pixel_values(), "classes_structure": torch.tensor([2, 2])}


INPUTS: dict[str, Any] = {
    "apertus1p5": _image_codes,
    "audio-spectrogram-transformer": _spectrum,
    "blip-2": _queried,
    "blip_2_qformer": _encoded,
    "clap": _mel,
    "depth_pro": _scaled,
    "dia": _codes,
    "diffusion_gemma": _prompt_and_canvas,
    "dots3_note": _image_and_sound,
    "edgetam_video": _session,
    "fun_asr_nano": _stacked,
    "fun_asr_nano_encoder": _stacked,
    "gemma3n_audio": _masked_mel,
    "gemma4_assistant": _shared_states,
    "gemma4_audio": _mel_128,
    "gemma4_unified_assistant": _shared_states,
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
    "kyutai_speech_to_text": _text_and_codes,
    "minicpm_ocr": _packed_and_text,
    "minicpm_ocr_vision": _packed,
    "minicpmv4_6": _packed_and_text,
    "minicpmv4_7": _packed_and_text,
    "minicpmv4_7_vision": _packed,
    "muse_glimmer_assistant": _noise,
    "muse_spark_audio": _whole_tokens,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "neucodec": _wave_and_spectrum,
    "omdet-turbo": _classes,
    "oneformer": _task,
    "pe_audio_video": _film,
    "pe_audio_video_encoder": _film,
    "pe_video": _film,
    "pe_video_encoder": _film,
    "perceiver": _features,
    "pi0": _robot,
    "pix2struct": _flattened,
    "pp_ocrv5_mobile_rec": _line,
    "qwen3_asr_encoder": _windowed_mel,
    "sam2_video": _session,
    "sam3_tracker_video": _session,
    "sam3_video": _session,
    "seggpt": _prompted,
    "siglip2": _naflex,
    "siglip2_vision_model": _naflex,
    "speech-encoder-decoder": _sound_to_text,
    "speecht5": _hidden_both,
    "timesfm": _series,
    "timesfm2_5": _series,
    "tvp": _clip,
    "vibevoice": _unsampled_and_text,
    "vibevoice_acoustic_tokenizer": _unsampled,
    "vibevoice_acoustic_tokenizer_decoder": _latents,
    "vibevoice_acoustic_tokenizer_encoder": _wave,
    "vibevoice_asr": _unsampled_and_text,
    "videomt": _video,
    "videoprism_vision_model": _video,
    "xcodec2": _wave_and_spectrum,
}
