"""Which layers of a model change form, and how a layer is put in the place of another."""

from hf_drt.targets.attention import attention_split, join_attention, split_attention
from hf_drt.targets.blocks import block_roots, is_checkpointing_layer
from hf_drt.targets.experts import copies
from hf_drt.targets.presence import present_layer
from hf_drt.targets.selection import Selection, find_targets, is_layer
from hf_drt.targets.surgery import Places, Swap, replace

__all__ = [
    "Places",
    "Selection",
    "Swap",
    "attention_split",
    "block_roots",
    "copies",
    "find_targets",
    "is_checkpointing_layer",
    "is_layer",
    "join_attention",
    "present_layer",
    "replace",
    "split_attention",
]
