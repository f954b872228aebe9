"""A change of form on several processes: decompositions shared out, and failures of one raised on all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_drt.engines.engine import Engine
from hf_drt.forms import Form, decompose, decomposed_dtype, decomposition_shapes, weight_shape


@dataclass(frozen=True)
class Job:
    """One layer to be decomposed for a form.

    Attributes:
        covariance: Second moments of its inputs, as :func:`hf_drt.forms.decompose` takes them, alike on all processes.
    """

    module: nn.Module
    form: Form
    covariance: Tensor | None = None


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


Parts = tuple[Tensor, ...] | None


def decompositions(engine: Engine, jobs: list[Job]) -> Iterator[Callable[[], Parts]]:
    """:func:`hf_drt.forms.decompose` of every job, each done by one process; what is given sends a job's result to all.

    All processes end with the same bits, whatever their hardware, and must take the results in this order. Until one is
    taken its owner alone holds it. On one process that holds the whole model each is made when it is taken. Of a
    sharded model a process holds the whole weight of one layer at a time.

    Raises:
        ValueError: A decomposition failed on any process; raised on all of them, before the first result is taken,
            since one that waits for another would wait for ever. The process itself raises what happened there, such as
            running out of memory.
    """
    if processes() == 1 and not engine.sharded:
        yield from (partial(decompose, job.module, job.form, job.covariance) for job in jobs)
        return
    owners = shares([_cost(job) for job in jobs], processes())
    own: dict[int, Parts] = {}
    error: Exception | None = None
    for index, module in _in_rounds(engine, jobs, owners):
        try:
            own[index] = decompose(module, jobs[index].form, jobs[index].covariance)
        except Exception as failure:
            error = failure
        del module  # before the next one is gathered
    raise_everywhere(error, engine.device(next(jobs[0].module.parameters())) if jobs else torch.device("cpu"))
    for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
        yield partial(_taken, engine, job, owner, own, index)


def _in_rounds(engine: Engine, jobs: list[Job], owners: list[int]) -> Iterator[tuple[int, nn.Module]]:
    """This process's jobs, and their layers with whole weights. In each round, in which all processes gather together,
    every owner gets its next one."""
    rank = dist.get_rank() if processes() > 1 else 0
    queues = [[i for i, owner in enumerate(owners) if owner == process] for process in range(processes())]
    for positions in zip_longest(*queues):
        mine = None
        for index in sorted(i for i in positions if i is not None):
            if decomposition_shapes(jobs[index].module, jobs[index].form) is None:
                continue
            whole = engine.whole_on(jobs[index].module, owners[index])
            if owners[index] == rank and whole is not None:
                mine = (index, whole)
            del whole
        if mine is not None:
            yield mine


def _cost(job: Job) -> float:
    d_out, d_in = weight_shape(job.module)
    return float(d_out * d_in * min(d_out, d_in))


def raise_everywhere(error: Exception | None, device: torch.device) -> None:
    """Raise on all processes what one of them has found. Collective.

    Args:
        device: Over which the processes talk, as :meth:`hf_drt.engines.Engine.device` tells.
    """
    failed = torch.tensor([float(error is not None)], device=device)
    if processes() > 1:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed.item():
        raise ValueError("the change of form failed on another process; its log has the reason.")


def _taken(engine: Engine, job: Job, owner: int, own: dict[int, Parts], index: int) -> Parts:
    """One result, from its owner to all. Whether there is one follows from the form, so no process has to ask."""
    shapes, part = decomposition_shapes(job.module, job.form), own.pop(index, None)
    if shapes is None or processes() == 1:
        return part
    if part is None:
        like = next(job.module.parameters())
        tensors = {name: p for name, p in job.module.named_parameters() if name != "bias"}
        dtype, device = decomposed_dtype(tensors), engine.device(like)
        part = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    for tensor in part:
        dist.broadcast(tensor, src=owner)
    return part
