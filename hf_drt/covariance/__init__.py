"""Second moments of layers' inputs, by which a truncation is weighed: from hooks, of training or of given batches."""

from hf_drt.covariance.calibration import covariances_of
from hf_drt.covariance.gathering import Gathering
from hf_drt.covariance.moments import add_moments, empty_moments
from hf_drt.covariance.projection import GradientProjection

__all__ = ["Gathering", "GradientProjection", "add_moments", "covariances_of", "empty_moments"]
