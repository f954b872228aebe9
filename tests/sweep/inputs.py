"""Inputs of a forward pass, from the names of its parameters and the model's configuration."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from tests.sweep.own_inputs import INPUTS

ROWS, TOKENS, FRAMES, SAMPLES = 2, 8, 64, 4000


class NoInput(Exception):
    """A parameter of the forward pass that nothing here makes a value for."""


def make_inputs(model: nn.Module, counts: dict[str, int] | None = None, text_only: bool = False) -> dict[str, Any]:
    """A batch that the model's forward pass takes.

    Args:
        model: With ``config``.
        counts: What :func:`learned` has read: placeholder tokens of each kind ('image', 'video', 'audio') among
            ``input_ids``; 'frames' before the channels of an image; 'bins' of a spectrum; 'mono' for one channel.
        text_only: Leave out optional images and sounds.

    Raises:
        NoInput: A required parameter is not known.
    """
    config = model.config
    torch.manual_seed(0)
    parameters = {
        name: p
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    build = Builder(config, set(parameters), counts or {})
    own = INPUTS.get(config.model_type)
    inputs = own(build) if own is not None else {}
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        if name in inputs or (own is not None and not required):
            continue
        make = getattr(build, name, None)
        if make is not None and (required or name in (build.text if text_only else build.usual)):
            inputs[name] = make()
        elif required:
            raise NoInput(f"no value for the parameter {name} of {type(model).__name__}.forward")
    return {name: value for name, value in inputs.items() if value is not None}


def learned(message: str) -> dict[str, int]:
    """What an error of a forward pass tells of the inputs that it wants."""
    if match := re.search(r"(image|video|audio) features.*tokens:? ?(\d+).*features:? ?(\d+)", message, re.I | re.S):
        same = match[2] == match[3]  # some architectures count numbers, not tokens
        return {match[1].lower(): int(match[3]) // 64 if same else int(match[3])}
    if re.search(r"expected 5, got [34]|a 5D tensor|have to specify pixel_values_videos", message):
        return {"frames": 2}
    if re.search(r"to have 1 channels, but got|must be mono", message):
        return {"mono": 1}
    match = re.search(r"normalized_shape=\[(\d+)\]|\(\d+x\d+ and (\d+)x\d+\)", message)
    return {"bins": int(match[1] or match[2])} if match else {}


def find(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration, or else one inside it, holds."""
    for holder in _holders(config):
        for name in names:
            if (value := getattr(holder, name, None)) is not None:
                return value
    return default


def _holders(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _holders(value)


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


class Builder:
    """Makes values for parameters: a method is named after the parameter that it is for.

    Attributes:
        usual: Parameters that get a value although they are optional.
    """

    usual = (
        "input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids", "bbox", "image_grid_thw",
        "mm_token_type_ids", "image_sizes", "pixel_attention_mask", "attention_mask", "input_points", "past_values",
        "audio_values", "visual_feats", "visual_pos", "actions", "states", "returns_to_go", "timesteps", "use_cache",
        "image_position_ids", "input_features_mask", "feature_attention_mask", "spatial_shapes",
        "moe_mm_token_type_ids",
    )  # fmt: skip

    text = ("input_ids", "use_cache", "decoder_input_ids", "attention_mask", "bbox", "mm_token_type_ids")

    def __init__(self, config: PretrainedConfig, parameters: set[str], counts: dict[str, int]):
        self.config, self.parameters, self.counts = config, parameters, counts
        text = config.get_text_config(decoder=False)
        self.vocab = max(8, min(100, find(text, "vocab_size", "text_vocab_size", default=100)))

    # ---- text

    def _tokens(self) -> Tensor:
        return torch.randint(3, max(4, self.vocab - 3), (ROWS, TOKENS))

    def _placeholders(self) -> list[tuple[str, int]]:
        return [(kind, n) for kind, n in self.counts.items() if kind in ("image", "video", "audio")]

    def input_ids(self) -> Tensor:
        ids = [self._tokens()]
        for kind, count in self._placeholders():
            token = find(self.config, f"{kind}_token_id", f"{kind}_token_index", f"{kind}_pad_token_id")
            ids.insert(0, torch.full((ROWS, count // ROWS), token))
        return torch.cat(ids, dim=1)

    def decoder_input_ids(self) -> Tensor:
        return self._tokens()

    def attention_mask(self) -> Tensor | None:
        return torch.ones_like(self.input_ids()) if "input_ids" in self.parameters else None

    def mm_token_type_ids(self) -> Tensor:
        kinds = {"image": 1, "video": 2, "audio": 3}
        types = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        for kind, count in self._placeholders():
            types = torch.cat([torch.full((ROWS, count // ROWS), kinds[kind]), types], dim=1)
        return types

    def moe_mm_token_type_ids(self) -> Tensor:
        return self.mm_token_type_ids()

    def bbox(self) -> Tensor:
        return torch.tensor([1, 2, 5, 9]).expand(ROWS, TOKENS, 4).clone()

    # ---- images

    def image_side(self) -> tuple[int, int]:
        size = find(self.config, "image_size", "crop_size", "input_size", default=64)
        return (_one(size), int(size[-1])) if isinstance(size, (list, tuple)) else (_one(size), _one(size))

    def channels(self) -> int:
        return _one(find(self.config, "num_channels", "in_channels", "in_chans", "image_channels", default=3))

    def grids(self) -> Tensor:
        return torch.tensor([[1, 4, 4]] * ROWS)

    def patches(self) -> Tensor:
        """Flattened patches of the images of :meth:`grids`."""
        patch = _one(find(self.config, "patch_size", default=14))
        length = self.channels() * patch * patch * _one(find(self.config, "temporal_patch_size", default=1))
        return torch.randn(int(self.grids().prod(dim=1).sum()), self.counts.get("bins", length))

    def pixel_values(self) -> Tensor:
        if {"image_grid_thw", "grid_thw"} & self.parameters:
            return self.patches()
        frames = [self.counts["frames"]] if "frames" in self.counts else []
        return torch.randn(ROWS, *frames, self.channels(), *self.image_side())

    def image_grid_thw(self) -> Tensor:
        return self.grids()

    def grid_thw(self) -> Tensor:
        return self.grids()

    def hidden_states(self) -> Tensor:
        if "grid_thw" in self.parameters:
            return self.patches()
        return torch.randn(ROWS, TOKENS, find(self.config, "hidden_size", "d_model"))

    def pixel_values_videos(self) -> Tensor:
        frames = find(self.config, "num_frames", "frames_per_clip", default=2)
        return torch.randn(ROWS, frames, self.channels(), *self.image_side())

    # ---- audio

    def input_features(self) -> Tensor:
        bins = find(
            self.config, "num_mel_bins", "n_mels", "input_feat_size", "input_dim", "feature_size", "feature_dim",
            "audio_hidden_size", default=80,
        )  # fmt: skip
        bins = self.counts.get("bins", bins)
        limit = find(self.config, "max_source_positions")
        frames = 2 * limit if limit is not None else FRAMES
        return torch.randn(ROWS, *((frames, bins) if self._time_first() else (bins, frames)))

    def _time_first(self) -> bool:
        return not any(
            word in self.config.model_type for word in ("whisper", "qwen", "voxtral", "flamingo", "glmasr", "moss")
        )

    def input_features_mask(self) -> Tensor:
        features = self.input_features()
        return torch.ones(ROWS, features.shape[1 if self._time_first() else 2], dtype=torch.long)

    def feature_attention_mask(self) -> Tensor:
        return self.input_features_mask()

    def input_values(self) -> Tensor:
        if "padding_mask" in self.parameters or "num_quantizers" in self.parameters:
            return torch.randn(ROWS, 1, SAMPLES)
        if "mono" in self.counts:
            return torch.randn(ROWS, 1, SAMPLES)
        if "bins" in self.counts:
            return torch.randn(ROWS, FRAMES, self.counts["bins"])
        return torch.randn(ROWS, SAMPLES)

    # ---- others

    def use_cache(self) -> bool:
        return False

    def query_embeds(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, find(self.config, "hidden_size"))

    def qformer_input_ids(self) -> Tensor:
        return self._tokens()

    def merge_sizes(self) -> Tensor:
        return torch.ones(ROWS, dtype=torch.long)

    def latents(self) -> Tensor:
        return torch.randn(ROWS, find(self.config, "hidden_size"), TOKENS)

    def image_sizes(self) -> Tensor | None:
        return torch.tensor([self.image_side()] * ROWS)

    def visual_feats(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, find(self.config, "visual_feat_dim"))

    def visual_pos(self) -> Tensor:
        return torch.rand(ROWS, TOKENS, find(self.config, "visual_pos_dim"))

    def actions(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, find(self.config, "act_dim"))

    def states(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, find(self.config, "state_dim"))

    def returns_to_go(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, 1)

    def timesteps(self) -> Tensor:
        return torch.arange(TOKENS).expand(ROWS, TOKENS).clone()

    def inputs_embeds(self) -> Tensor:
        return torch.randn(ROWS, TOKENS, find(self.config.get_text_config(decoder=False), "hidden_size", "d_model"))

    def past_values(self) -> Tensor:
        length = find(self.config, "context_length", default=32)
        lags = find(self.config, "lags_sequence", default=[0])
        channels = find(self.config, "num_input_channels", "input_size", default=1)
        if "past_time_features" in self.parameters:
            return torch.randn(ROWS, length + max(lags), *([channels] if channels > 1 else []))
        return torch.randn(ROWS, length, channels)

    def past_time_features(self) -> Tensor:
        features = find(self.config, "num_time_features", default=0)
        return torch.randn(*self.past_values().shape[:2], features)

    def past_observed_mask(self) -> Tensor:
        return torch.ones_like(self.past_values())


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of floating point in a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
