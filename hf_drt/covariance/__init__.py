"""Second moments of layers' inputs, by which a truncation is weighed: from hooks, of training or of given batches."""

from hf_drt.covariance.calibration import call, checked_batches, covariances_of, evaluating
from hf_drt.covariance.gathering import Gathering
from hf_drt.covariance.moments import add_moments, empty_moments
from hf_drt.covariance.projection import GradientProjection
from hf_drt.covariance.sensitivity import Sensitivity, sensitivity_of

__all__ = [
    "Gathering",
    "GradientProjection",
    "Sensitivity",
    "add_moments",
    "call",
    "checked_batches",
    "covariances_of",
    "empty_moments",
    "evaluating",
    "sensitivity_of",
]
