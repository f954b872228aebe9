"""The settings on memory of activations, beside what the training arguments say of the whole run."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_drt.activations import checkpointing_error
from hf_drt.config import DRTConfig
from hf_drt.trainer.compiler import compiler


def checkpointing_options(args: TrainingArguments) -> dict[str, Any]:
    """What the arguments give for checkpointed blocks, for those of single phases too."""
    options: Any = args.gradient_checkpointing_kwargs  # which the arguments have read from JSON
    return {} if options is None else {**options}


def refuse_activations(model: nn.Module, args: TrainingArguments, config: DRTConfig) -> None:
    """Raise where what blocks keep cannot be switched from phase to phase.

    Raises:
        ValueError: The whole run is checkpointed, by the Trainer or by FSDP; or as
            :func:`hf_drt.activations.checkpointing_error`.
    """
    if config.recompute != "none" and compiler() is not None:
        raise ValueError(
            f"recompute='{config.recompute}' does not go with torch_compile (--dynamo_backend of accelerate launch): "
            "the compiler plans by itself what a forward pass keeps. Leave one of the two out."
        )
    recomputes = "recompute" if config.recompute != "none" else None
    if not config.dense_checkpointing and recomputes is None:
        return
    fsdp: Any = args.fsdp_config or {}
    for name, on in (
        ("activation_checkpointing (gradient_checkpointing)", args.gradient_checkpointing),
        ("fsdp_config['activation_checkpointing']", str(fsdp.get("activation_checkpointing")).lower() == "true"),
    ):
        if on and (own := "dense_checkpointing" if config.dense_checkpointing else recomputes):
            raise ValueError(
                f"{own} has no effect: {name} checkpoints the blocks in every phase. Turn that off, or leave {own} out."
            )
    if reason := checkpointing_error(model, config, checkpointing_options(args)):
        raise ValueError(reason)
