"""hf_drt: dynamic-rank training for Hugging Face Transformers."""

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank, Transition
from hf_drt.declaration import declare
from hf_drt.export import dense_state_dict, merge_errors
from hf_drt.forms import Adapter, Dense, Factored, Form, convert, effective_weight, empty_like, form_of
from hf_drt.hub import register_native_format
from hf_drt.schedule import Phase, Plan, Run, Schedule
from hf_drt.selection import Selection, find_targets
from hf_drt.state import CheckpointError
from hf_drt.trainer import (
    DRTCallback,
    DRTSeq2SeqTrainer,
    DRTSeq2SeqTrainingArguments,
    DRTTrainer,
    DRTTrainerMixin,
    DRTTrainingArguments,
)

__version__ = "0.1.0"

register_native_format()

__all__ = [
    "Adapter",
    "CheckpointError",
    "DRTCallback",
    "DRTConfig",
    "DRTSeq2SeqTrainer",
    "DRTSeq2SeqTrainingArguments",
    "DRTTrainer",
    "DRTTrainerMixin",
    "DRTTrainingArguments",
    "Dense",
    "DynamicRank",
    "Factored",
    "Form",
    "Phase",
    "Plan",
    "Run",
    "Schedule",
    "Selection",
    "Transition",
    "convert",
    "declare",
    "dense_state_dict",
    "effective_weight",
    "empty_like",
    "find_targets",
    "form_of",
    "merge_errors",
]
