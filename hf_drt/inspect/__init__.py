"""What a checkpoint on disk holds: forms, spectra, and its difference from another."""

from hf_drt.inspect.checkpoint import Checkpoint, Spectrum, StoredLayer, read_checkpoint, spectra
from hf_drt.inspect.comparison import (
    LogitDifference,
    WeightDifference,
    common_layers,
    logit_difference,
    weight_differences,
)

__all__ = [
    "Checkpoint",
    "LogitDifference",
    "Spectrum",
    "StoredLayer",
    "WeightDifference",
    "common_layers",
    "logit_difference",
    "read_checkpoint",
    "spectra",
    "weight_differences",
]
