"""A change of form on several processes: decompositions shared out, and DistributedDataParallel built anew in place."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from hf_drt.forms import Form, decompose, decomposition_shapes, weight_shape
from hf_drt.spectral import SVD, working_dtype


@dataclass(frozen=True)
class Job:
    """One layer to be decomposed for a form."""

    module: nn.Module
    form: Form


def processes() -> int:
    """Number of processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shares(costs: list[float], count: int) -> list[int]:
    """Owner of every job: the costliest first, each to the process that has the least so far."""
    load, owner = [0.0] * count, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda j: -costs[j]):
        owner[job] = min(range(count), key=lambda process: load[process])
        load[owner[job]] += costs[job]
    return owner


def decompositions(jobs: list[Job]) -> list[SVD | None]:
    """:func:`hf_drt.forms.decompose` of every job, each done by one process and sent to all.

    All processes end with the same bits, whatever their hardware. On one process it is a plain loop.

    Raises:
        ValueError: A decomposition failed on any process; raised on all of them, since one that waits for another
            would wait for ever. The process itself raises what happened there, such as running out of memory.
    """
    if processes() == 1:
        return [decompose(job.module, job.form) for job in jobs]
    owners = shares([_cost(job) for job in jobs], processes())
    results: list[SVD | None] = [None] * len(jobs)
    error: Exception | None = None
    for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
        if owner == dist.get_rank():
            try:
                results[index] = decompose(job.module, job.form)
            except Exception as failure:
                error = failure
    _raise_everywhere(error, jobs)
    return [_broadcast(job, owner, part) for job, owner, part in zip(jobs, owners, results, strict=True)]


def _cost(job: Job) -> float:
    out, into = weight_shape(job.module)
    return float(out * into * min(out, into))


def _raise_everywhere(error: Exception | None, jobs: list[Job]) -> None:
    device = next(jobs[0].module.parameters()).device if jobs else torch.device("cpu")
    failed = torch.tensor([float(error is not None)], device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed.item():
        raise ValueError("a decomposition failed on another process; its log has the reason.")


def _broadcast(job: Job, owner: int, part: SVD | None) -> SVD | None:
    """One result to all processes. Whether there is one follows from the form, so no process has to ask."""
    shapes = decomposition_shapes(job.module, job.form)
    if shapes is None:
        return None
    if part is None:
        like = next(job.module.parameters())
        part = SVD(*(torch.empty(shape, dtype=working_dtype(like.dtype), device=like.device) for shape in shapes))
    for tensor in part:
        dist.broadcast(tensor, src=owner)
    return part


def rebuild_ddp(ddp: DistributedDataParallel, options: dict[str, Any]) -> None:
    """Build the reducer anew over the wrapped module's present parameters, in the same DDP object.

    A reducer knows the parameters that existed when it was made: new ones would never be reduced, and the processes
    drift apart without an error. Every reference to the object, as in the Trainer's loop, stays valid; communication
    hooks are kept, with their state objects, in which PowerSGD starts anew. The constructor sends rank 0's parameters
    to all.

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
    # The old reducer's hooks on gradients go first, or they would fire next to the new ones.
    ddp.logger = None
    ddp.reducer = None
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
