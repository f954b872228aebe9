"""How many processes a launcher has started, as far as one of them can tell."""

import functools
import logging
import os

import torch.distributed as dist

logger = logging.getLogger(__name__)

_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACES = ("RANK", "LOCAL_RANK")  # of a process among the others


def launched_processes() -> int:
    """Processes of the process group; while there is none, of torchrun, accelerate launch, a Kubernetes job or mpirun,
    which say it in the environment. 1 of a single process."""
    if is_joined():
        return dist.get_world_size()
    sizes = [os.environ.get(name, "") for name in _MPI_SIZES]
    # Some clusters set WORLD_SIZE for a single process, too; but not which of several it is.
    if any(os.environ.get(name, "").isdigit() for name in _PLACES):
        sizes.append(os.environ.get("WORLD_SIZE", ""))
    return max((int(size) for size in sizes if size.isdigit()), default=1)


def is_joined() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


@functools.cache
def warn_of_lone_process() -> None:
    """Say, once, in a loop of one's own which several processes run without a process group."""
    if not is_joined() and launched_processes() > 1:
        logger.warning(
            "%d processes were launched, but there is no process group: each trains on all data by itself, and changes "
            "the form of every layer itself. If they are to train together, call torch.distributed.init_process_group "
            "(or make an Accelerator; without a GPU Accelerator(cpu=True)) before the first update step.",
            launched_processes(),
        )
