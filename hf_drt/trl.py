"""Supervised fine-tuning with TRL in dynamic rank. The one module that needs TRL; ``import hf_drt`` leaves it out.

For TRL's other trainers: ``class MyTrainer(DRTTrainerMixin, DPOTrainer)``, with the settings as ``drt=``.
"""

from dataclasses import dataclass
from typing import Any

try:
    from trl import SFTConfig, SFTTrainer  # type: ignore[reportPrivateImportUsage]  # public, and imported on demand
except ImportError as error:
    raise ImportError(
        f"hf_drt.trl needs TRL 1.16 or newer, which cannot be imported ({error}). Run: pip install 'hf-drt[trl]'"
    ) from error

from hf_drt.trainer import DRTFields, DRTTrainerMixin, Validated


@dataclass
class DRTSFTConfig(Validated, DRTFields, SFTConfig):
    """TRL's ``SFTConfig`` plus the fields of :class:`hf_drt.DRTConfig`, each with the prefix ``drt_``.

    ``drt_schedule`` unset means plain training.

    Raises:
        ValueError: As :func:`hf_drt.trainer.arguments.checked_config`.
    """


class DRTSFTTrainer(DRTTrainerMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` with dynamic-rank training; see :class:`hf_drt.DRTTrainerMixin`.

    Settings come from ``drt=``, else from a :class:`DRTSFTConfig`.

    Raises:
        TypeError: ``args`` have ``drt_*`` fields, but are no ``SFTConfig``.
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, **options: Any):
        if isinstance(args, DRTFields) and not isinstance(args, SFTConfig):
            # SFTTrainer makes an SFTConfig of them, which has no drt_* fields.
            raise TypeError(
                f"DRTSFTTrainer takes its drt_* settings from a DRTSFTConfig, got {type(args).__name__}. Use "
                "DRTSFTConfig, which has the same fields, or TrainingArguments and drt=."
            )
        super().__init__(model, args, *more, **options)
