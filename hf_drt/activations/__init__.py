"""What the blocks of a model keep of a forward pass for the backward pass, by phase."""

from hf_drt.activations.blocks import Activations, checkpointing_error

__all__ = ["Activations", "checkpointing_error"]
