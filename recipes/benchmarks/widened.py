"""Products in bfloat16 as CPUs and GPUs with instructions for them do them, on a machine that has none.

Such instructions multiply numbers of 8 bits exactly, add up in float32, and round the sum once. So does a product of
the same numbers in float32, rounded at the end; where a CPU has none, torch's own takes many times as long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
FORWARD = _aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, FORWARD,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}  # fmt: skip


class Widened(TorchDispatchMode):
    """Within it products, and attention, of tensors in bfloat16 are computed in float32, and their results rounded."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or not any(_is_half(value) for value in args):
            return func(*args, **(kwargs or {}))
        wide = [value.float() if _is_half(value) else value for value in args]
        results = func(*wide, **(kwargs or {}))
        if func is FORWARD:  # whose second result, the logarithms of sums, is in float32 anyway
            return results[0].bfloat16(), results[1]
        return tuple(r.bfloat16() for r in results) if isinstance(results, tuple) else results.bfloat16()


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
