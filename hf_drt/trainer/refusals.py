"""Engines under which a change of form would go wrong in silence: refused in the constructor, with the way out."""

from typing import Any

from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_drt.config import DRTConfig
from hf_drt.optim import form_group_options


def refuse_unsupported(trainer: Any, config: DRTConfig) -> None:
    """Raise for every combination that is known not to work.

    Raises:
        ValueError: Names what was found and what to do.
    """
    args, model = trainer.args, trainer.model
    reasons = {
        "DeepSpeed, which partitions parameters": trainer.is_deepspeed_enabled,
        "FSDP, which shards or flattens parameters": trainer.is_fsdp_enabled or bool(args.fsdp),
        "nn.DataParallel, which replicates the model in every step": args.n_gpu > 1,
        "a quantized model": getattr(model, "is_quantized", False),
        "a PEFT model, which has changed the layers already": hasattr(model, "peft_config"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(
                f"dynamic-rank training does not support {reason}. Train the original model on one device, or on "
                "several with one process each (DistributedDataParallel); or unset drt_schedule."
            )
    if args.push_to_hub and args.hub_strategy != HubStrategy.END and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value} would publish weights in low-rank form, which plain transformers "
            "cannot load. Use hub_strategy=end: the dense model is pushed when training is over."
        )
    if config.evaluate_at_switch and trainer.eval_dataset is None:
        raise ValueError("evaluate_at_switch needs an eval_dataset, got None. Pass one, or turn it off.")
    if form_group_options(config) and trainer.lr_scheduler is not None:
        raise ValueError(
            "factored_lr_scale, adapter_lr_scale and frobenius_decay add parameter groups, but a scheduler was passed "
            "that already counts them. Pass optimizers=(optimizer, None), or override create_scheduler."
        )
