"""Optimizers of packages that need an accelerator of their own kind, or have no build for this torch."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule


def _add(name: str, optim: str, what: str, needed: str) -> None:
    reason = f"it needs {needed}, with which a change of form has not been tried."
    OPTIMIZERS.add(name, OptimizerRule(what, optim={optim: {}}, refused=reason, nearest="adamw_torch"))


_add("torch_xla.amp.syncfree.adamw.AdamW", "adamw_torch_xla", "torch_xla's AdamW", "torch_xla")
_add("torch_npu.optim.npu_fused_adamw.NpuFusedAdamW", "adamw_torch_npu_fused", "torch_npu's fused AdamW", "torch_npu")
_add(
    "torchdistx.optimizers.anyprecision_optimizer.AnyPrecisionAdamW",
    "adamw_anyprecision",
    "torchdistx's AdamW of any precision",
    "torchdistx",
)
