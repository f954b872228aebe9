"""hf_drt: dynamic-rank training for Hugging Face Transformers."""

from hf_drt.checkpoint import CheckpointError, declare
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.export import dense_state_dict, merge_errors, register_native_format
from hf_drt.forms import Adapter, Dense, Factored, Form, convert, effective_weight, empty_like, form_of
from hf_drt.renamed import accept_old_names
from hf_drt.schedule import Phase, Plan, Run, Schedule
from hf_drt.targets import Selection, find_targets
from hf_drt.trainer import (
    DRTCallback,
    DRTSeq2SeqTrainer,
    DRTSeq2SeqTrainingArguments,
    DRTTrainer,
    DRTTrainerMixin,
    DRTTrainingArguments,
)
from hf_drt.transition import Transition

__version__ = "0.1.0"

accept_old_names()
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
