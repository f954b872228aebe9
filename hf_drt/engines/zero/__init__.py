"""DeepSpeed's ZeRO: one engine for its three stages, and the optimizer as the Trainer sees it."""

from hf_drt.engines.zero.engine import Zero
from hf_drt.engines.zero.loading import reads_any_layout
from hf_drt.engines.zero.regrouped import Regrouped, inner_groups, inner_optimizer
from hf_drt.engines.zero.renewal import trains

__all__ = ["Regrouped", "Zero", "inner_groups", "inner_optimizer", "reads_any_layout", "trains"]
