"""DeepSpeed on a CPU, with tiny models."""

import torch

from hf_drt.engines import engine_of


def deepspeed(stage: int, **changes) -> dict:
    """A configuration of DeepSpeed, under which ZeRO-3 partitions the smallest of weights."""
    zero = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 2000}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 40, "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_prefetch_bucket_size": 2000,
        }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}, "zero_optimization": zero | changes,
    }  # fmt: skip


def whole(model) -> dict[str, torch.Tensor]:
    """Copies of all parameters, gathered: under any engine."""
    engine = engine_of(model)
    return {name: engine.full(p).detach().clone() for name, p in model.named_parameters()}
