"""Several processes: who holds what of a weight, and who decomposes it."""

from hf_drt.engines.decompose import Job, decompositions, shares
from hf_drt.engines.engine import Engine, trainable_size, whole_size
from hf_drt.engines.launch import is_joined, launched_processes, warn_of_lone_process
from hf_drt.engines.registry import ENGINES, engine_of, import_engines, is_wrapper, parts_of_zero, unwrapped
from hf_drt.engines.single import Single

__all__ = [
    "ENGINES",
    "Engine",
    "Job",
    "Single",
    "decompositions",
    "engine_of",
    "import_engines",
    "is_joined",
    "is_wrapper",
    "launched_processes",
    "parts_of_zero",
    "shares",
    "trainable_size",
    "unwrapped",
    "warn_of_lone_process",
    "whole_size",
]
