"""A controller's rules put on an optimizer: all checks, then its place among the owners, form groups, step hooks."""

from collections.abc import Callable

import torch
from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.engines import engine_of
from hf_drt.forms import frozen_by_user, layer_of, layout_of, weight_shape
from hf_drt.optim.attention import follow_split
from hf_drt.optim.counts import OwnCounts
from hf_drt.optim.groups import add_form_groups
from hf_drt.optim.index import GroupIndex
from hf_drt.optim.own import check_own
from hf_drt.optim.owners import Owner, entry, owners
from hf_drt.optim.rates import check_rate
from hf_drt.optim.registry import rule_of
from hf_drt.optim.step import StepRules


def staged(
    optimizer: torch.optim.Optimizer, owner: Owner, config: DRTConfig
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Check all that the optimizer has to allow. The first of the functions makes the owner one of the optimizer's, the
    second gives it its form groups.

    Raises:
        ValueError: The optimizer is not supported, or not for a layer's weights; lacks a weight, has no room for the
            rules, or shares a group with another model that a rule must not touch. Nothing has changed then.
    """
    if (model := owner.model()) is not None:
        follow_split(optimizer, model)
    OwnCounts.settle(optimizer)
    # Gradients of what the matrix optimizer trains are not seen by the optimizer's own step.
    if rule_of(optimizer).matrices_alone and not config.uses_matrix_optimizer:
        _check_matrices(type(optimizer).__name__, owner)
    if model is not None and engine_of(model).sharded:
        refuse_sharded(config)
    check_own(optimizer, config)
    check_rate(optimizer, config, owner.parameters())
    return entry(optimizer, owner), add_form_groups(optimizer, owner, config)


def refuse_sharded(config: DRTConfig) -> None:
    """What a sharded model cannot have.

    Raises:
        ValueError: The matrix optimizer is set, or bases in int8.
    """
    if config.frozen_dtype == "int8":
        raise ValueError(
            "frozen_dtype=int8 keeps codes and a scale for each row, and FSDP shards them apart, which has not been "
            "tried. Take frozen_dtype=bfloat16, or train with DDP."
        )
    if config.uses_matrix_optimizer:
        raise ValueError(
            f"matrix_optimizer={config.matrix_optimizer} needs whole matrices, and FSDP shards them. Train with DDP "
            "(leave fsdp out of the training arguments), or set matrix_optimizer to 'none'."
            f"{config.without_matrix_optimizer}"
        )


def _check_matrices(optimizer: str, owner: Owner) -> None:
    """Factors of a kernel are matrices, but not the kernel: what takes matrices alone would fail at its first step.

    Raises:
        ValueError: A layer's dense weight is no matrix.
    """
    model = owner.model()
    for name, module in {} if model is None else {name: layer_of(model, name) for name in owner.names}.items():
        shape = layout_of(module).shape(*weight_shape(module))
        if len(shape) != 2:
            raise ValueError(
                f"{optimizer} takes matrices alone, but the dense weight of {name} has shape {shape}. Leave the layer "
                "out of dynamic-rank training with exclude=, or use AdamW."
            )


def install(optimizer: torch.optim.Optimizer, owner: Owner, config: DRTConfig, targets: dict[str, nn.Module]) -> None:
    """Put the rules in force. Raises as :func:`staged`, before anything has changed."""
    enter, add_groups = staged(optimizer, owner, config)
    index = GroupIndex(optimizer)
    for name, module in targets.items():
        if not frozen_by_user(module):
            index.homes(name, module)
    OwnCounts.install(optimizer)
    StepRules.clear(optimizer)  # first: a step that has raised leaves its scaled rates behind
    enter()
    add_groups()
    if any(other.rewarms or other.scales for other in owners(optimizer)):
        StepRules(optimizer)
