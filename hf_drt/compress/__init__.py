"""A trained model made smaller after the fact."""

from hf_drt.compress.allocation import Curve, allocate
from hf_drt.compress.compression import Compression, compress, plan_compression

__all__ = ["Compression", "Curve", "allocate", "compress", "plan_compression"]
