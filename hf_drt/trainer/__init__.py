"""All knowledge of transformers.Trainer."""

from hf_drt.trainer.arguments import DRTSeq2SeqTrainingArguments, DRTTrainingArguments
from hf_drt.trainer.callback import DRTCallback
from hf_drt.trainer.mixin import DRTSeq2SeqTrainer, DRTTrainer, DRTTrainerMixin

__all__ = [
    "DRTCallback",
    "DRTSeq2SeqTrainer",
    "DRTSeq2SeqTrainingArguments",
    "DRTTrainer",
    "DRTTrainerMixin",
    "DRTTrainingArguments",
]
