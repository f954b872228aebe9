"""Several processes: who holds what of a weight, and who decomposes it."""

from hf_drt.engines.decompose import Job, decompositions, shares
from hf_drt.engines.engine import Engine
from hf_drt.engines.registry import ENGINES, engine_of, is_wrapper, unwrapped
from hf_drt.engines.single import Single

__all__ = [
    "ENGINES",
    "Engine",
    "Job",
    "Single",
    "decompositions",
    "engine_of",
    "is_wrapper",
    "shares",
    "unwrapped",
]
