"""Several processes: who holds what of a weight, and who decomposes it."""

from hf_drt.engines.ddp import renewed_reducer
from hf_drt.engines.decompose import Job, decompositions, raise_everywhere
from hf_drt.engines.fsdp2 import full, gathered, group_of, is_sharded, reshard, sharded_like, splice

__all__ = [
    "Job",
    "decompositions",
    "full",
    "gathered",
    "group_of",
    "is_sharded",
    "raise_everywhere",
    "renewed_reducer",
    "reshard",
    "sharded_like",
    "splice",
]
