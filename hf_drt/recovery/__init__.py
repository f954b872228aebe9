"""What a compression has lost, regained: layer by layer by least squares, then by a short distillation."""

from hf_drt.recovery.distillation import DistillationTrainer, distance
from hf_drt.recovery.recovering import DTYPES, compress_and_recover, recover
from hf_drt.recovery.result import LayerRecovery, Recovery, Stage

__all__ = [
    "DTYPES",
    "DistillationTrainer",
    "LayerRecovery",
    "Recovery",
    "Stage",
    "compress_and_recover",
    "distance",
    "recover",
]
