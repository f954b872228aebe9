"""Second moments of layers' inputs, by which a truncation is weighed: from hooks, of training or of given batches."""

from hf_drt.covariance.calibration import call, checked_batches, covariances_of, evaluating
from hf_drt.covariance.chain import Chain, Passes, chained
from hf_drt.covariance.gathering import Gathering
from hf_drt.covariance.lockstep import CrossMoments, cross_moments, in_order, output_errors, whole_passes
from hf_drt.covariance.moments import add_moments, empty_moments
from hf_drt.covariance.projection import GradientProjection
from hf_drt.covariance.sensitivity import Sensitivity, sensitivity_of

__all__ = [
    "Chain",
    "CrossMoments",
    "Gathering",
    "GradientProjection",
    "Passes",
    "Sensitivity",
    "add_moments",
    "call",
    "chained",
    "checked_batches",
    "covariances_of",
    "cross_moments",
    "empty_moments",
    "evaluating",
    "in_order",
    "output_errors",
    "sensitivity_of",
    "whole_passes",
]
