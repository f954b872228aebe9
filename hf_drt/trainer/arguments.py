"""TrainingArguments with ``drt_*`` fields, made from DRTConfig so that every parameter is written once."""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_drt.config import DRTConfig
from hf_drt.planning import refuse_without_schedule

PREFIX = "drt_"


def _prefixed_fields() -> list[tuple]:
    hints = get_type_hints(DRTConfig)
    made = []
    for f in fields(DRTConfig):
        # A command line carries a dict as JSON text; DRTConfig reads both.
        kind = str | None if f.name == "rank_pattern" else hints[f.name]
        made.append((PREFIX + f.name, kind, field(default=f.default, metadata=f.metadata)))
    return made


def checked_config(source: Any) -> DRTConfig:
    """The settings of an object with ``drt_*`` attributes.

    Raises:
        ValueError: As DRTConfig does, and where there are settings without a schedule.
    """
    config = DRTConfig.from_prefixed(source, PREFIX)
    refuse_without_schedule(config)
    return config


def turn_off(args: Any) -> None:
    """Set every ``drt_*`` attribute to its default: plain training."""
    for f in fields(DRTConfig):
        setattr(args, PREFIX + f.name, f.default)


if TYPE_CHECKING:
    _Arguments = TrainingArguments
else:  # a mixin for those of any library
    _Arguments = object


class Validated(_Arguments):
    """Checks the ``drt_*`` values of training arguments as soon as they are made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_config(self)


# The fields alone, for a parser and for other libraries' training arguments.
DRTFields = make_dataclass("DRTFields", _prefixed_fields())


@dataclass
class DRTTrainingArguments(Validated, DRTFields, TrainingArguments):
    """``TrainingArguments`` plus the fields of :class:`hf_drt.DRTConfig`, each with the prefix ``drt_``.

    ``drt_schedule`` unset means plain training.

    Raises:
        ValueError: As :func:`checked_config`.
    """


@dataclass
class DRTSeq2SeqTrainingArguments(Validated, DRTFields, Seq2SeqTrainingArguments):
    """``Seq2SeqTrainingArguments`` plus the fields of :class:`hf_drt.DRTConfig`, each with the prefix ``drt_``."""
