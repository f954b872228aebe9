"""hf_drt: dynamic-rank training for Hugging Face Transformers.

Names are imported when they are asked for: :class:`DynamicRank` and all else for a loop of one's own comes without
transformers, and the command line without either. Native checkpoints load from ``import hf_drt`` on all the same.
"""

from typing import TYPE_CHECKING

from hf_drt.after_import import called_after
from hf_drt.lazy import lazy_names
from hf_drt.native_format import make_known
from hf_drt.renamed import accept_old_names

if TYPE_CHECKING:
    from hf_drt.checkpoint import CheckpointError, declare
    from hf_drt.config import DRTConfig
    from hf_drt.controller import DynamicRank
    from hf_drt.ema import EMA, EMADecay
    from hf_drt.export import dense_state_dict, merge_errors, save_linear_pairs
    from hf_drt.forms import Adapter, Dense, Factored, Form, convert, effective_weight, empty_like, form_of
    from hf_drt.schedule import Phase, Plan, Run, Schedule
    from hf_drt.targets import Selection, find_targets, join_attention, split_attention
    from hf_drt.trainer import (
        DRTCallback,
        DRTSeq2SeqTrainer,
        DRTSeq2SeqTrainingArguments,
        DRTTrainer,
        DRTTrainerMixin,
        DRTTrainingArguments,
        EMACallback,
        divide_batch,
    )
    from hf_drt.transition import Transition

__version__ = "0.2.0.dev0"

_NAMES = {
    "checkpoint": ("CheckpointError", "declare"),
    "config": ("DRTConfig",),
    "controller": ("DynamicRank",),
    "ema": ("EMA", "EMADecay"),
    "export": ("dense_state_dict", "merge_errors", "save_linear_pairs"),
    "forms": ("Adapter", "Dense", "Factored", "Form", "convert", "effective_weight", "empty_like", "form_of"),
    "schedule": ("Phase", "Plan", "Run", "Schedule"),
    "targets": ("Selection", "find_targets", "join_attention", "split_attention"),
    "trainer": (
        "DRTCallback",
        "DRTSeq2SeqTrainer",
        "DRTSeq2SeqTrainingArguments",
        "DRTTrainer",
        "DRTTrainerMixin",
        "DRTTrainingArguments",
        "EMACallback",
        "divide_batch",
    ),
    "transition": ("Transition",),
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES, modules=("engines", "linalg", "messages", "optim", "planning"))

accept_old_names()
called_after("transformers.quantizers.auto", make_known)

__all__ = [
    "EMA",
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
    "EMACallback",
    "EMADecay",
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
    "divide_batch",
    "effective_weight",
    "empty_like",
    "find_targets",
    "form_of",
    "join_attention",
    "merge_errors",
    "save_linear_pairs",
    "split_attention",
]
