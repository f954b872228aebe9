"""StepCounter: the FLOPs of operations, and the memory that their tensors take. Works on tensors without data too."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kw: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts the fused attention of accelerators only.
_RULES = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class StepCounter(TorchDispatchMode):
    """Counts the FLOPs of the operations inside the mode, by torch's own rules (:mod:`torch.utils.flop_counter`), and
    the storages that they have made and that are still alive.

    What a kernel allocates and frees on its own is not seen.

    Attributes:
        flops: Of products of matrices, attention and convolutions.
        now, peak: Bytes that are alive, and their maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed; of one that holds others, as codes and scales, theirs."""
        if is_traceable_wrapper_subclass(tensor):
            for inner in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
                if isinstance(inner, torch.Tensor):  # a sharded one tells its mesh too
                    self.add(inner)
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (rule := _RULES.get(func._overloadpacket)) is not None:
            self.flops += rule(*args, **kwargs, out_val=result)
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result
