"""All knowledge of transformers.Trainer."""

from hf_drt.trainer.arguments import (
    PREFIX,
    DRTFields,
    DRTSeq2SeqTrainingArguments,
    DRTTrainingArguments,
    Validated,
    checked_config,
)
from hf_drt.trainer.callback import DRTCallback
from hf_drt.trainer.elastic import divide_batch
from hf_drt.trainer.ema import EMACallback
from hf_drt.trainer.lr import simulated_curve
from hf_drt.trainer.mixin import DRTSeq2SeqTrainer, DRTTrainer, DRTTrainerMixin
from hf_drt.trainer.refusals import unused
from hf_drt.trainer.untouched import untouched

__all__ = [
    "PREFIX",
    "DRTCallback",
    "DRTFields",
    "DRTSeq2SeqTrainer",
    "DRTSeq2SeqTrainingArguments",
    "DRTTrainer",
    "DRTTrainerMixin",
    "DRTTrainingArguments",
    "EMACallback",
    "Validated",
    "checked_config",
    "divide_batch",
    "simulated_curve",
    "untouched",
    "unused",
]
