"""DistributedDataParallel around a model that changes form."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from hf_drt.engines.engine import uncompiled
from hf_drt.engines.single import Single


class DDP(Single):
    """Every process holds the whole model, and a wrapper around it averages the gradients."""

    help = "DistributedDataParallel: every process holds the whole model"

    @classmethod
    def manages(cls, model: nn.Module) -> bool:
        return isinstance(model, DistributedDataParallel)

    @classmethod
    def inside(cls, module: nn.Module) -> nn.Module | None:
        return module.module if isinstance(module, DistributedDataParallel) else None

    @classmethod
    def begun(cls, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def around_switch(self, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        return renewed_reducer(cast(DistributedDataParallel, uncompiled(self.model)), options)


@contextlib.contextmanager
def renewed_reducer(ddp: DistributedDataParallel, options: dict[str, Any]) -> Iterator[None]:
    """Within the block the wrapped module may change its parameters; after it the same DDP object reduces the new ones.

    A reducer knows the parameters that existed when it was made: new ones would never be reduced, and the processes
    drift apart without an error. It goes first, since its buckets keep the old parameters and a copy of all gradients
    alive, and its hooks would fire next to the new ones. The DDP object stays, with its communication hooks, so that
    every reference to it, as in the Trainer's loop, stays valid; PowerSGD starts anew in its state object. The
    constructor sends rank 0's parameters to all.

    Args:
        ddp: The wrapper in use.
        options: The keyword arguments it was made with (accelerate's ``ddp_handler.to_kwargs()``).
    """
    hooks = list(ddp._comm_hooks)
    kept = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device if ddp.device_ids else None,
        "process_group": ddp.process_group,
    }
    module = ddp.module
    ddp.logger = None
    ddp.reducer = None  # pyright: ignore[reportAttributeAccessIssue]  # until the constructor makes it anew
    yield  # if it fails here, it fails on all processes: nothing is built, and nothing waits
    allowed = inspect.signature(DistributedDataParallel.__init__).parameters
    DistributedDataParallel.__init__(ddp, module, **kept, **{k: v for k, v in options.items() if k in allowed})
    for hook, state in hooks:
        _forget_buckets(state)
        ddp.register_comm_hook(state, hook)


def _forget_buckets(state: object) -> None:
    """Drop what a communication hook's state remembers of buckets that are gone.

    PowerSGD keeps error feedback and warm starts by bucket index: added to a bucket of other parameters they raise, or
    where the sizes happen to agree, corrupt the gradients in silence.
    """
    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        # Two updates without compression, as at the start of training: after the first one DDP lays out its buckets
        # anew, and in it a new adapter's lora_A has the gradient 0, whose norm PowerSGD divides by.
        state.iter = min(state.iter, state.start_powerSGD_iter - 2)
