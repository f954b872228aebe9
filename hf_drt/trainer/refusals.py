"""Engines under which a change of form would go wrong in silence: refused in the constructor, with the way out."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from hf_drt.config import DRTConfig
from hf_drt.engines import launched_processes, unwrapped
from hf_drt.forms import layer_of
from hf_drt.optim import (
    check_rate,
    form_group_options,
    group_settings,
    known_rule,
    own_rate,
    refuse_sharded,
    unwrap,
)
from hf_drt.planning import TargetLayers, Usage, idle_settings, lowrank_kind, refuse_idle, schedule_of, usage_of
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Schedule
from hf_drt.trainer.activations import refuse_activations
from hf_drt.trainer.autocast import refuse_dtypes
from hf_drt.trainer.compiler import refuse_regions
from hf_drt.trainer.zero import faults


def refuse_unsupported(trainer: Any, config: DRTConfig) -> None:
    """Raise for every combination that is known not to work.

    Raises:
        ValueError: Names what was found and what to do.
    """
    refuse_lone_process(trainer.args)
    for found, (applies, remedy) in _engines(trainer).items():
        if applies:
            raise ValueError(f"dynamic-rank training does not support {found}. {remedy} Or unset drt_schedule.")
    if fault := next(faults(trainer, config), None):
        raise ValueError(f"dynamic-rank training does not support {fault}. Or unset drt_schedule.")
    _refuse_nameless(trainer.model, config)
    refuse_dtypes(trainer, config)
    args = trainer.args
    refuse_activations(trainer.model, args, config)
    if config.tag_phases and (not args.push_to_hub or args.hub_strategy == HubStrategy.END):
        raise ValueError(
            "tag_phases makes revisions on the Hub of what is pushed during training, but nothing is: push_to_hub is "
            f"{args.push_to_hub}, hub_strategy is {args.hub_strategy.value}. Set push_to_hub with "
            "hub_strategy=every_save, checkpoint or all_checkpoints; or turn tag_phases off."
        )
    if config.evaluate_at_switch and trainer.eval_dataset is None:
        raise ValueError("evaluate_at_switch needs an eval_dataset, got None. Pass one, or turn it off.")
    if trainer.is_fsdp_enabled:
        refuse_sharded(config)
    if form_group_options(config) and trainer.lr_scheduler is not None:
        raise ValueError(
            f"{group_settings(config)}: this adds parameter groups, but a scheduler was passed that already counts "
            "them. Pass optimizers=(optimizer, None), or override create_scheduler."
            f"{config.without_matrix_optimizer}"
        )


def refuse_anchors_with_scaler(schedule: Schedule, scaler: Any, fused: bool) -> None:
    """Raise where a phase begins at a learning rate, and the Trainer may count updates without stepping its scheduler.

    Args:
        schedule: As written.
        scaler: The gradient scaler, or None.
        fused: Whether the optimizer leaves out an update that overflows by itself. Accelerate takes it for made then,
            and the scheduler is stepped.

    Raises:
        ValueError: There is an LR anchor, and a scaler around an optimizer that is not fused.
    """
    anchor = next((entry for entry in schedule.entries if entry.at.is_anchor), None)
    if anchor is not None and scaler is not None and not fused:
        raise ValueError(
            f"'{anchor}' cannot be resolved before a run in fp16: its gradient scaler leaves out updates that "
            "overflow, and the learning rate of all later ones comes late by as many. Give the boundary in % or steps, "
            "train in bf16, or use a fused optimizer (optim='adamw_torch_fused'), whose scheduler counts every update."
        )


def refuse_lone_process(args: Any) -> None:
    """Raise where several processes were launched, and each would train on all data alone, into one folder.

    Raises:
        ValueError: There are more processes than Accelerate has joined.
    """
    launched = launched_processes()
    if launched > args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate has joined only {args.world_size}: each would train "
            "on all data by itself and write into the same output_dir. Without a GPU processes are joined if the "
            "training arguments say use_cpu=True (--use_cpu). On GPUs start them with torchrun or accelerate launch; "
            "or start one process."
        )


def refuse_unused(model: nn.Module, config: DRTConfig, layers: TargetLayers) -> None:
    """Raise where a setting would have no effect in a Trainer's run of this model.

    Raises:
        ValueError: 'lowrank' for weights of which it is not clear whether they are trained; or a setting that nothing
            uses (:mod:`hf_drt.planning.idle_settings`).
    """
    refuse_idle(_usage(model, config, layers))


def unused(model: nn.Module, config: DRTConfig) -> list[tuple[str, str]]:
    """Settings for which :func:`refuse_unused` would raise, each with the reason."""
    return list(idle_settings(_usage(model, config, TargetLayers.of(model, config))))


def _usage(model: nn.Module, config: DRTConfig, layers: TargetLayers) -> Usage:
    return usage_of(config, lowrank_kind(schedule_of(config), config, model), layers.shapes)


def _refuse_nameless(model: nn.Module, config: DRTConfig) -> None:
    """Raise where the form that is to be saved is declared in a configuration that the model does not have."""
    if not EXPORTERS[config.export].declared or any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return
    raise ValueError(
        f"export={config.export} is declared in the configuration of a model of transformers, and there is none in "
        f"this {type(model).__name__}: nothing could load what is saved. Use export=dense, a plain state dict; "
        "checkpoints resume all the same."
    )


def refuse_layers(trainer: Any, config: DRTConfig, layers: TargetLayers) -> None:
    """Raise where layers are selected that could not change form, or be saved at the end.

    Raises:
        ValueError: The model, or fused experts, where what the run is exported as cannot hold them; or layers outside
            of the blocks that are compiled one by one.
    """
    if not trainer.is_fsdp_enabled:  # which compiles modules in place
        refuse_regions(trainer.model, layers.shapes)
    EXPORTERS[config.export].check_model(unwrapped(trainer.model))
    EXPORTERS[config.export].check_targets({name: layer_of(trainer.model, name) for name in layers.shapes})


def refuse_own_rate(optimizer: torch.optim.Optimizer, config: DRTConfig, schedule: Schedule) -> None:
    """Raise where a setting goes by a learning rate that the optimizer does not apply.

    Raises:
        ValueError: As in :func:`hf_drt.optim.check_rate`; or a boundary is an LR anchor.
    """
    optimizer = unwrap(optimizer)
    check_rate(optimizer, config)
    anchor = next((entry for entry in schedule.entries if entry.at.is_anchor), None)
    if anchor is not None and (rate := own_rate(optimizer)) is not None:
        name = type(optimizer).__name__
        raise ValueError(
            f"'{anchor}' begins at a share of the scheduler's peak learning rate, but {name} with {rate.option} "
            f"computes its own rate during the run. Use {name}(params, {rate.instead}) with a scheduler, or give the "
            "boundary in % or steps."
        )


def refuse_own_rate_of(trainer: Any, config: DRTConfig) -> None:
    """:func:`refuse_own_rate`, of the optimizer that the trainer has or is told to make."""
    optimizer = trainer.optimizer if trainer.optimizer is not None else _sample(trainer)
    if optimizer is not None and config.parsed is not None:
        refuse_own_rate(optimizer, config, config.parsed)


def _sample(trainer: Any) -> torch.optim.Optimizer | None:
    """An optimizer of the kind that ``optimizer_cls_and_kwargs`` asks for, over a matrix of one number, where the kind
    may have a rate of its own."""
    if trainer.optimizer_cls_and_kwargs is None:
        return None
    kind, settings = trainer.optimizer_cls_and_kwargs
    rule = known_rule(kind) if isinstance(kind, type) else None
    if rule is None or rule.own_rate is None:
        return None
    settings = {key: value for key, value in settings.items() if key not in ("params", "model", "optimizer_dict")}
    return kind([torch.nn.Parameter(torch.zeros(1, 1))], **settings)


_DISTRIBUTED = "Use FSDP2 (--fsdp with fsdp_config={'version': 2}), or DistributedDataParallel (torchrun alone)."


def _engines(trainer: Any) -> dict[str, tuple[bool, str]]:
    """What was found, whether it applies, and the way out."""
    args, model = trainer.args, trainer.model
    return {
        "FSDP1, which flattens the parameters of a block into one": (_fsdp_version(trainer) == 1, _DISTRIBUTED),
        "FSDP on XLA, which wraps layers for good": (
            bool(getattr(trainer, "is_fsdp_xla_enabled", False)),
            _DISTRIBUTED,
        ),
        "tensor parallelism, which has cut the weights into slices": (
            (getattr(model, "_tp_size", None) or 1) > 1,
            f"Load the model without tp_plan. {_DISTRIBUTED}",
        ),
        "a model that transformers has sharded while loading": (
            bool(getattr(model, "is_distributed_loading_by_transformers", False)),
            f"Load it without distributed_config. {_DISTRIBUTED}",
        ),
        "nn.DataParallel, which replicates the model in every step": (
            args.n_gpu > 1,
            "Start one process per device with torchrun or accelerate launch, or show it one device with "
            "CUDA_VISIBLE_DEVICES=0.",
        ),
        "a quantized model": (bool(getattr(model, "is_quantized", False)), "Train the original model."),
    }


def _fsdp_version(trainer: Any) -> int | None:
    """1 or 2, or None without FSDP."""
    if not trainer.is_fsdp_enabled:
        return None
    return getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
