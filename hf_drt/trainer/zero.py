"""DeepSpeed in a Trainer's run: what is refused, the optimizer that Accelerate gets, and what a checkpoint needs.

The Trainer hands its optimizer to Accelerate together with the model. DeepSpeed would take the model's parameters out
of it; it gets another one in its place (:mod:`hf_drt.engines.zero`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_utils import HubStrategy

from hf_drt.checkpoint import read_state
from hf_drt.config import DRTConfig
from hf_drt.engines import parts_of_zero
from hf_drt.optim import step_scales, unwrap

# Optimizers whose step goes element by element, so that it is the same on flat tensors, and that make their state at
# the first step.
_ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop)
COUNTS = "optimizer_counts"  # in drt_state.json: steps that each parameter has made, where they differ


def faults(trainer: Any, config: DRTConfig) -> Iterator[str]:
    """What of DeepSpeed's configuration, or of ours, does not go with a change of form under it; each with the way out.
    Nothing without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return
    yield from _of_engine(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    yield from _of_settings(trainer, config)


def _of_engine(given: dict[str, Any]) -> Iterator[str]:
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        yield f"DeepSpeed with zero_optimization.stage={stage}. Set it to 1, 2 or 3; or leave deepspeed out, for DDP"
    for key, instead in (("optimizer", "--optim and --learning_rate"), ("scheduler", "--lr_scheduler_type")):
        if key in given:
            yield f"'{key}' in DeepSpeed's configuration. Take it out: the Trainer makes its own, by {instead}"
    precision = given.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and precision in ("fp32", "float32"):
        yield (
            f"data_types.grad_accum_dtype={precision} with ZeRO-1, for which DeepSpeed has an optimizer of its own "
            "in bf16. Set zero_optimization.stage to 2, or leave it out"
        )
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        yield (
            "ZeRO-3 that saves no model. Set zero_optimization.stage3_gather_16bit_weights_on_model_save to true, so "
            "that checkpoints and save_model() have the whole weights"
        )
    for name in ("offload_param", "offload_optimizer"):
        if (device := zero.get(name, {}).get("device", "none")) not in ("none", "cpu"):
            yield f"zero_optimization.{name}.device={device}. Set it to cpu or none"
    for name in ("zero_hpz_partition_size", "mics_shard_size"):
        if isinstance(size := zero.get(name, 1), int) and size > 1:
            yield f"zero_optimization.{name}={size}. Leave it out"
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(name):
            yield f"zero_optimization.{name}. Leave it out"
    if (size := given.get("tensor_parallel", {}).get("autotp_size", 0)) > 1:
        yield f"tensor_parallel.autotp_size={size} of DeepSpeed. Leave it out"
    if given.get("hybrid_engine", {}).get("enabled"):
        yield "DeepSpeed's hybrid_engine. Leave it out"


def _of_settings(trainer: Any, config: DRTConfig) -> Iterator[str]:
    args = trainer.args
    off = {
        "drt_frobenius_decay": config.frobenius_decay,
        "drt_frozen_dtype": config.frozen_dtype is not None,
        "drt_truncation=activation": config.truncation == "activation",  # not tried there
        "drt_dense_accumulation": config.dense_accumulation > 1,
        "load_best_model_at_end": args.load_best_model_at_end,
        "torch_compile": args.torch_compile,
        "auto_find_batch_size": args.auto_find_batch_size,
        "drt_export=adapter": config.export == "adapter",
        f"hub_strategy={args.hub_strategy.value}": args.push_to_hub and args.hub_strategy != HubStrategy.END,
    }
    for name in (name for name, on in off.items() if on):
        yield f"{name} under DeepSpeed. Leave it out; or use DDP or FSDP2"
    if config.uses_matrix_optimizer:
        yield (
            "the matrix optimizer under DeepSpeed, which keeps weights in flat tensors. Set drt_matrix_optimizer=none; "
            f"or use DDP.{config.without_matrix_optimizer}"
        )
    kind = _kind(trainer)
    if kind is not None and kind not in _ELEMENTWISE:
        names = ", ".join(cls.__name__ for cls in _ELEMENTWISE)
        yield f"{kind.__name__} under DeepSpeed: of the optimizers {names} are. Set optim=adamw_torch"


def _kind(trainer: Any) -> type | None:
    if trainer.optimizer is not None:
        return type(unwrap(trainer.optimizer))
    given = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return given[0] if isinstance(given[0], type) else None


@contextlib.contextmanager
def prepared_for_zero(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """In the block Accelerate gets, to prepare for DeepSpeed, the inner optimizer of one that stays the Trainer's.

    Args:
        checkpoint: The folder that is resumed from.
    """
    if not trainer.is_deepspeed_enabled:
        yield
        return
    accelerator, counts = trainer.accelerator, {} if checkpoint is None else read_state(checkpoint).get(COUNTS, {})
    prepare = accelerator.prepare

    def with_groups(*objects: Any, **kwargs: Any) -> Any:
        if len(objects) < 2 or objects[1] is not trainer.optimizer:
            return prepare(*objects, **kwargs)
        model, outer, *rest = objects
        return _attached(outer, prepare(model, _inner(model, outer, counts), *rest, **kwargs))

    accelerator.prepare = with_groups
    try:
        yield
    finally:
        del accelerator.prepare


def _inner(model: torch.nn.Module, outer: torch.optim.Optimizer, counts: dict[str, float]) -> torch.optim.Optimizer:
    zero = parts_of_zero()
    by_parameter = {p: counts.get(name, 0.0) for name, p in model.named_parameters()}
    groups = zero.inner_groups(outer.param_groups, lambda p: by_parameter.get(p, 0.0), outer.defaults)
    return zero.inner_optimizer(outer, groups)


def _attached(outer: torch.optim.Optimizer, prepared: Any) -> Any:
    zero = parts_of_zero()
    engine, wrapper, *_ = prepared
    wrapper.optimizer = zero.Regrouped(outer, step_scales)
    zero.trains(engine, wrapper.optimizer)
    zero.reads_any_layout(engine)
    return prepared


def take_rates(trainer: Any) -> None:
    """After a checkpoint has been loaded: DeepSpeed's has the groups of the inner optimizer, and of the outer one's
    rates only the scheduler's file knows."""
    if trainer.is_deepspeed_enabled:
        groups, rates = trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def counts_of(trainer: Any) -> dict[str, Any]:
    """What ``drt_state.json`` needs of the optimizer beside the structure."""
    if not trainer.is_deepspeed_enabled:
        return {}
    counts = trainer.optimizer.optimizer.counts({p: name for name, p in trainer.model.named_parameters()})
    return {COUNTS: counts} if counts else {}


def refuse_second_run(trainer: Any) -> None:
    """Raise where DeepSpeed has an engine around the model already.

    Raises:
        ValueError: It has.
    """
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise ValueError(
            "DeepSpeed has wrapped this trainer's model already, in an earlier train() or evaluate(), and Accelerate "
            "prepares it once. Make a new trainer; to go on with a run, with resume_from_checkpoint."
        )
