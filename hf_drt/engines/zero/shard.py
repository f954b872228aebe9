"""Shard: what one process holds of a tensor whose parts lie on all processes, each element on one of them."""

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Elements ``start`` to ``start + len(values)`` of a tensor in the order of its storage.

    Attributes:
        values: ``(elements,)``; empty where this process holds none.
        start: Index of the first one.
        shape: Of the whole tensor, equal on all processes.
        device: On which the whole tensor is wanted.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, whole: Tensor, start: int, count: int) -> "Shard":
        """This process's part of a tensor that all have, in memory of its own."""
        end = min(start + count, whole.numel())
        values = whole.detach().reshape(-1)[min(start, end) : end]
        return cls(at_rest(values), start, tuple(whole.shape), whole.device)

    def whole(self) -> Tensor:
        """The whole tensor. Collective: a sum over processes of which one at most has anything but zero at a place, so
        that no bit changes."""
        flat = torch.zeros(prod(self.shape), dtype=self.values.dtype, device=self.device)
        flat[self.start : self.start + len(self.values)] = self.values.to(self.device)
        dist.all_reduce(flat)
        return flat.view(self.shape)


def at_rest(values: Tensor) -> Tensor:
    """A copy of a part of a tensor in the host's memory, where it waits for the end of a switch: an accelerator has no
    room for the old and the new optimizer state at once."""
    return values.detach().to("cpu", copy=True)


def chunk(numel: int) -> tuple[int, int]:
    """Start and length of this process's part where nobody has laid the tensor out yet: equal ones but for the last."""
    count = -(-numel // dist.get_world_size())
    return dist.get_rank() * count, count
