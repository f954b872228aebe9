"""Several processes: who holds what of a weight, and who decomposes it."""

from hf_drt.engines.decompose import Job, decompositions
from hf_drt.engines.engine import Engine, whole_size
from hf_drt.engines.registry import ENGINES, engine_of, import_engines, is_wrapper, unwrapped
from hf_drt.engines.single import Single

__all__ = [
    "ENGINES",
    "Engine",
    "Job",
    "Single",
    "decompositions",
    "engine_of",
    "import_engines",
    "is_wrapper",
    "unwrapped",
    "whole_size",
]
