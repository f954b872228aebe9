"""A trained model made smaller after the fact."""

from hf_drt.compress.allocation import Curve, allocate
from hf_drt.compress.compression import compress, plan_compression
from hf_drt.compress.criteria import ALLOCATIONS
from hf_drt.compress.curve import LossCurve, Point, loss_curve
from hf_drt.compress.objective import Loss, has_loss, mean_loss, model_loss
from hf_drt.compress.result import Compression, LayerCompression, Trial

__all__ = [
    "ALLOCATIONS",
    "Compression",
    "Curve",
    "LayerCompression",
    "Loss",
    "LossCurve",
    "Point",
    "Trial",
    "allocate",
    "compress",
    "has_loss",
    "loss_curve",
    "mean_loss",
    "model_loss",
    "plan_compression",
]
