"""A training batch that a model of transformers takes, by its shapes: for a step that is only counted, or timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PER_SAMPLE = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
_PER_TOKEN = ("ForTokenClassification",)
_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


@dataclass(frozen=True)
class Field:
    """One tensor of a batch: its shape, and the number of values if it is whole numbers ``0 .. high - 1``; None for
    numbers from a normal distribution."""

    shape: tuple[int, ...]
    high: int | None = None


@dataclass(frozen=True)
class BatchSpec:
    """A batch by its shapes.

    Attributes:
        fields: By argument of the model's forward pass, labels included.
        tokens: Positions in the main input: token ids, or samples where it is no text.
    """

    fields: dict[str, Field]
    tokens: int

    @property
    def rows(self) -> int:
        """Samples."""
        return next(iter(self.fields.values())).shape[0]

    def piece(self, count: int) -> "BatchSpec":
        """The largest of so many pieces of the batch, as equal as can be; one sample where there are more pieces."""
        rows = -(-self.rows // count)
        fields = {name: Field((rows, *field.shape[1:]), field.high) for name, field in self.fields.items()}
        return BatchSpec(fields, self.tokens * rows // self.rows)

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch on the CPU."""
        return {
            name: torch.randn(field.shape, generator=generator)
            if field.high is None
            else torch.randint(0, field.high, field.shape, generator=generator)
            for name, field in self.fields.items()
        }

    def empty(self) -> dict[str, Tensor]:
        """A batch of zeros; of no memory inside a fake tensor mode."""
        return {
            name: torch.zeros(field.shape, dtype=torch.float32 if field.high is None else torch.long)
            for name, field in self.fields.items()
        }


def batch_spec(model: nn.Module, rows: int, length: int, labels: bool = True) -> BatchSpec:
    """The batch that a model takes.

    Args:
        model: Of transformers, with a head that computes a loss.
        rows: Samples.
        length: Tokens of a sample, source and target each; audio samples of a waveform. Images have the size of the
            model's configuration.
        labels: False for the inputs of a forward pass alone.

    Raises:
        ValueError: The model's input or labels are of a kind that is not known here, or ``length`` exceeds the
            positions that the model has.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main not in _INPUTS:
        raise ValueError(
            f"{type(model).__name__} takes '{main}', and batches can be made of {', '.join(_INPUTS)} only. Estimate "
            "the cost of a model for text, images or speech."
        )
    _check_length(model, main, length)
    fields = {main: _INPUTS[main](model.config, rows, length)}
    if labels:
        fields |= _labels(model, rows, length)
    elif getattr(model.config, "is_encoder_decoder", False):
        fields["decoder_input_ids"] = Field((rows, length), _vocabulary(model.config))
    return BatchSpec(fields, rows * length if main == "input_ids" else rows)


def _ids(config: Any, rows: int, length: int) -> Field:
    return Field((rows, length), _vocabulary(config))


def _image(config: Any, rows: int, length: int) -> Field:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return Field((rows, getattr(vision, "num_channels", 3), height, width))


def _spectrogram(config: Any, rows: int, length: int) -> Field:
    return Field((rows, config.num_mel_bins, 2 * config.max_source_positions))


def _waveform(config: Any, rows: int, length: int) -> Field:
    return Field((rows, length))


_INPUTS: dict[str, Callable[[Any, int, int], Field]] = {
    "input_ids": _ids,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _waveform,
}


def _vocabulary(config: Any) -> int:
    return config.get_text_config(decoder=False).vocab_size


def _labels(model: nn.Module, rows: int, length: int) -> dict[str, Field]:
    name = type(model).__name__
    config: Any = model.config
    if name.endswith(_PER_SAMPLE):
        return {"labels": Field((rows,), max(2, config.num_labels))}
    if name.endswith(_PER_TOKEN):
        return {"labels": Field((rows, length), config.num_labels)}
    if name.endswith("ForQuestionAnswering"):
        return {key: Field((rows,), length) for key in ("start_positions", "end_positions")}
    if name.endswith(_LANGUAGE):
        return {"labels": Field((rows, length), _vocabulary(config))}
    raise ValueError(
        f"{name} has no loss that is known here, so that no training step can be counted. Name a task whose model has "
        "one, e.g. causal-lm or sequence-classification."
    )


def _check_length(model: nn.Module, main: str, length: int) -> None:
    config: Any = model.config
    limit = getattr(config.get_text_config(decoder=False), "max_position_embeddings", None)
    if main == "input_ids" and isinstance(limit, int) and 0 < limit < length:
        raise ValueError(f"sequences of {length} tokens exceed the {limit} positions of {type(model).__name__}.")
