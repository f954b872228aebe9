"""How an engine lays a model out over processes: what each holds, and what it sends in an update step.

Of each engine as Accelerate 1.15 and transformers 5.24 run it, with the engine's own defaults. Sizes are bytes of one
process, in its largest shard; ``n`` are the bytes of the parameters in question, ``p`` the processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_drt.simulate.processes.inventory import Entry, Inventory
from hf_drt.simulate.processes.links import Machine
from hf_drt.simulate.processes.ring import Collective, Ring

MIB = 2**20


@dataclass(frozen=True)
class Held:
    """Bytes that a process holds in an update step, activations aside.

    Attributes:
        weights: Parameters and buffers, or its shards of them, with those of float32 beside them where an engine keeps
            two.
        gradients: Of all trainable parameters, or its shards of them.
        gathered: Whole weights of other processes' shards: of the layer that computes, of the next one, and of what
            is kept.
        sending: Buffers of gradients on their way.
    """

    weights: int
    gradients: int
    gathered: int
    sending: int


@dataclass(frozen=True)
class Layout(ABC):
    """One engine on so many processes.

    Attributes:
        count: Processes.
        mixed: Whether weights of float32 compute in bfloat16.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    whole_state: ClassVar[bool] = False
    """Whether every process holds all of the optimizer's state."""
    makes_dtype: ClassVar[bool] = False
    """Whether the engine chooses the weights' dtype itself."""

    count: int
    mixed: bool = False

    @property
    def shards(self) -> int:
        """Into how many parts a whole weight is cut, of which a process has one."""
        return self.count

    def rings(self, machine: Machine) -> tuple[Ring, Ring]:
        """Of the processes that have one copy of the model between them; and of those with the same part of it."""
        return machine.ring(self.shards), machine.ring(self.count // self.shards, self.shards)

    @abstractmethod
    def held(self, have: Inventory, accumulation: int) -> Held:
        """What a process holds."""

    @abstractmethod
    def state_of(self, have: Inventory) -> list[nn.Parameter]:
        """What a process's optimizer updates: tensors without data."""

    @abstractmethod
    def update(self, have: Inventory, accumulation: int, machine: Machine) -> list[Collective]:
        """What is sent in an update step of so many forward and backward passes."""

    @abstractmethod
    def whole(self, entries: Sequence[Entry], machine: Machine) -> list[Collective]:
        """What it takes that every process has these parameters whole, as a change of form needs them."""

    @abstractmethod
    def renewed(self, have: Inventory, machine: Machine) -> list[Collective]:
        """What the engine sends once the model has changed, before training goes on."""


class Ddp(Layout):
    """Every process holds the whole model, and gradients are averaged once in an update step."""

    name, help, whole_state = "ddp", "DistributedDataParallel: all of the model on every process", True
    bucket: ClassVar[int] = 25 * MIB  # DDP's own default of bucket_cap_mb

    @property
    def shards(self) -> int:
        return 1

    def rings(self, machine: Machine) -> tuple[Ring, Ring]:
        return machine.ring(1), machine.ring(self.count)

    def held(self, have: Inventory, accumulation: int) -> Held:
        """Gradients twice, the second time in DDP's buckets (``gradient_as_bucket_view`` is off by default)."""
        gradients = _bytes(have.trainable)
        return Held(_bytes(have.entries) + have.buffers, gradients, 0, gradients)

    def state_of(self, have: Inventory) -> list[nn.Parameter]:
        return [_like(entry.shape, entry.dtype) for entry in have.trainable]

    def update(self, have: Inventory, accumulation: int, machine: Machine) -> list[Collective]:
        """An all-reduce of the gradients, in the dtype of the weights: under autocast that is float32. All passes but
        the last are within ``no_sync``. Buffers are broadcast in the last."""
        _, ring = self.rings(machine)
        gradients = _bytes(have.trainable)
        found = [Collective("all_reduce", gradients, ring, _pieces(gradients, self.bucket))]
        return found + ([Collective("broadcast", have.buffers, ring)] if have.buffers else [])

    def whole(self, entries: Sequence[Entry], machine: Machine) -> list[Collective]:
        return []

    def renewed(self, have: Inventory, machine: Machine) -> list[Collective]:
        """DDP's constructor sends the first process's weights and buffers to all."""
        size = _bytes(have.entries) + have.buffers
        return [Collective("broadcast", size, self.rings(machine)[1], _pieces(size, 250 * MIB))]


class Fsdp2(Layout):
    """Blocks of which each process holds a part, cut along the first dimension."""

    name, help = "fsdp2", "FSDP2 over all processes"

    def _gather(self, entries: Iterable[Entry]) -> int:
        return sum(e.padded(self.shards) * (2 if self.mixed else e.dtype.itemsize) for e in entries)

    def _reduce(self, entries: Iterable[Entry]) -> int:
        """In the dtype in which weights compute: Accelerate's policy reduces in it too."""
        return self._gather(e for e in entries if e.trainable)

    def held(self, have: Inventory, accumulation: int) -> Held:
        """Gathered are the units that are kept, and the two largest of the others: one computes, the next is on its
        way. Gradients on their way are those of the largest unit, as backward has made them and as they are sent.
        Where gradients accumulate they do so whole, as Accelerate's ``no_sync`` leaves them unreduced until the last
        pass."""
        units = have.by_unit()
        passing = sorted((self._gather(unit) for n, unit in units.items() if n not in have.kept), reverse=True)
        kept = sum(self._gather(unit) for number, unit in units.items() if number in have.kept)
        gradients = sum(e.padded(self.shards) // self.shards * e.dtype.itemsize for e in have.trainable)
        if accumulation > 1:
            gradients += sum(e.numel * (2 if self.mixed else e.dtype.itemsize) for e in have.trainable)
        sending = 2 * max(map(self._reduce, units.values()), default=0)
        weights = sum(e.padded(self.shards) // self.shards * e.dtype.itemsize for e in have.entries)
        return Held(weights + have.buffers, gradients, kept + sum(passing[:2]), sending)

    def state_of(self, have: Inventory) -> list[nn.Parameter]:
        return [_like(entry.shard(self.shards), entry.dtype) for entry in have.trainable]

    def update(self, have: Inventory, accumulation: int, machine: Machine) -> list[Collective]:
        """In every pass each unit is gathered, forward and backward, those that are kept once. In the last pass
        gradients are reduced and scattered, and averaged over replicas if there are any. All of it with every parameter
        rounded up to as many rows as there are shards."""
        inside, across = self.rings(machine)
        found = []
        for number, unit in have.by_unit().items():
            calls = accumulation * (1 if number in have.kept else 2)
            found.append(Collective("all_gather", self._gather(unit), inside).times(calls))
            if reduced := self._reduce(unit):
                found.append(Collective("reduce_scatter", reduced, inside))
                if across.count > 1:
                    found.append(Collective("all_reduce", reduced / self.shards, across))
        return found

    def whole(self, entries: Sequence[Entry], machine: Machine) -> list[Collective]:
        inside, _ = self.rings(machine)
        return [Collective("all_gather", e.padded(self.shards) * e.dtype.itemsize, inside) for e in entries]

    def renewed(self, have: Inventory, machine: Machine) -> list[Collective]:
        return []


@dataclass(frozen=True)
class Hsdp(Fsdp2):
    """FSDP2 among some processes, and replicas of that.

    Attributes:
        parts: Processes that have one copy between them; those of consecutive ranks.
    """

    name, help = "hsdp", "FSDP2 among --shards processes, whose replicas average gradients"
    parts: int = 1

    @property
    def shards(self) -> int:
        return self.parts


class _Zero(Layout):
    """DeepSpeed, with its own defaults; with ``mixed`` its bf16."""

    makes_dtype = True
    prefetch: ClassVar[int] = 50_000_000
    bucket: ClassVar[int] = 500_000_000  # elements: reduce_bucket_size, allgather_bucket_size
    persistent: ClassVar[int] = 100_000  # elements: stage3_param_persistence_threshold
    live: ClassVar[int] = 1_000_000_000  # elements: stage3_max_live_parameters

    def _size(self, entries: Iterable[Entry]) -> int:
        return sum(e.numel for e in entries) * self._item

    @property
    def _item(self) -> int:
        return 2 if self.mixed else 4

    def _part(self, entries: Iterable[Entry]) -> int:
        """Elements of a process's part of some parameters."""
        return sum(e.flat(self.count) for e in entries)

    def _sending(self, have: Inventory) -> int:
        """A bucket, and a process's part of the gradients in float32 for the optimizer."""
        trainable = sum(e.numel for e in have.trainable)
        return min(self.bucket, trainable) * self._item + 4 * self._part(have.trainable)

    def state_of(self, have: Inventory) -> list[nn.Parameter]:
        """One flat tensor of float32."""
        return [_like((self._part(have.trainable),), torch.float32)] if have.trainable else []

    def _calls(self, entries: Iterable[Entry]) -> int:
        return _pieces(sum(e.numel for e in entries), self.bucket)


class Zero1(_Zero):
    """Whole weights and gradients; each process has a part of the optimizer's state, and updates those weights."""

    name, help = "zero1", "DeepSpeed ZeRO-1: the optimizer's state in parts"

    def held(self, have: Inventory, accumulation: int) -> Held:
        """Beside the weights, a process's part of them in float32."""
        weights = self._size(have.entries) + have.buffers + 4 * self._part(have.trainable)
        return Held(weights, self._gradients(have), 0, self._sending(have))

    def _gradients(self, have: Inventory) -> int:
        return self._size(have.trainable)

    def _reductions(self, accumulation: int) -> int:
        return 1

    def update(self, have: Inventory, accumulation: int, machine: Machine) -> list[Collective]:
        """An all-reduce of the gradients, of which a process keeps its part: DeepSpeed's default
        (``use_multi_rank_bucket_allreduce``), though a reduce-scatter, half of it, would do (Rajbhandari et al. 2020,
        arXiv 1910.02054, section 7). Then an all-gather of the updated weights."""
        ring, size, calls = machine.ring(self.count), self._size(have.trainable), self._calls(have.trainable)
        reduced = Collective("all_reduce", size, ring, calls).times(self._reductions(accumulation))
        return [reduced, Collective("all_gather", size, ring, calls)]

    def whole(self, entries: Sequence[Entry], machine: Machine) -> list[Collective]:
        return []

    def renewed(self, have: Inventory, machine: Machine) -> list[Collective]:
        """The engine is made anew, which sends the first process's weights to all."""
        return [Collective("broadcast", self._size(have.entries), machine.ring(self.count), len(have.entries))]


class Zero2(Zero1):
    """As ZeRO-1, and each process keeps its part of the gradients alone."""

    name, help = "zero2", "DeepSpeed ZeRO-2: gradients in parts too"

    def _gradients(self, have: Inventory) -> int:
        return self._part(have.trainable) * self._item

    def _reductions(self, accumulation: int) -> int:
        """In every pass: what is in parts cannot wait."""
        return accumulation


class Zero3(_Zero):
    """Weights in parts too, cut without regard to rows; small ones are whole everywhere."""

    name, help = "zero3", "DeepSpeed ZeRO-3: weights in parts too"

    def _split(self, have: Inventory) -> tuple[list[Entry], list[Entry]]:
        """Those in parts, and those that are whole everywhere."""
        small = [e for e in have.entries if e.numel <= self.persistent]
        return [e for e in have.entries if e.numel > self.persistent], small

    def _gather(self, entries: Iterable[Entry]) -> int:
        return self._part(entries) * self.count * self._item

    def held(self, have: Inventory, accumulation: int) -> Held:
        """Gathered weights stay until as many others have been used (``stage3_max_live_parameters``)."""
        parts, small = self._split(have)
        weights = (self._part(have.entries)) * self._item + self._size(small) + have.buffers
        largest = max((sum(e.numel for e in unit) for unit in have.by_unit().values()), default=0)
        live = min(max(self.live, largest), sum(e.numel for e in parts)) * self._item
        gradients = self._part(have.trainable) * self._item
        return Held(weights + 4 * self._part(have.trainable), gradients, live, self._sending(have))

    def update(self, have: Inventory, accumulation: int, machine: Machine) -> list[Collective]:
        """In every pass weights are gathered, forward and backward, and gradients reduced and scattered. Small weights
        are gathered once, after the update."""
        ring, (_, small) = machine.ring(self.count), self._split(have)
        found = []
        for unit in have.by_unit().values():
            if mine := [e for e in unit if e.numel > self.persistent]:
                calls = _pieces(sum(e.numel for e in mine), self.prefetch)
                found.append(Collective("all_gather", self._gather(mine), ring, calls).times(2 * accumulation))
        reduced = Collective("reduce_scatter", self._gather(have.trainable), ring, self._calls(have.trainable))
        found.append(reduced.times(accumulation))
        return found + ([Collective("all_gather", self._gather(small), ring)] if small else [])

    def whole(self, entries: Sequence[Entry], machine: Machine) -> list[Collective]:
        ring = machine.ring(self.count)
        return [Collective("all_gather", self._gather([e]), ring) for e in entries if e.numel > self.persistent]

    def renewed(self, have: Inventory, machine: Machine) -> list[Collective]:
        return []


LAYOUTS: dict[str, type[Layout]] = {kind.name: kind for kind in (Ddp, Fsdp2, Hsdp, Zero1, Zero2, Zero3)}
"""Engines by name."""


def layout_for(engine: str, count: int, mixed: bool = False, shards: int | None = None) -> Layout:
    """An engine on so many processes.

    Args:
        engine: One of :data:`LAYOUTS`.
        count: Processes.
        mixed: Whether weights of float32 compute in bfloat16.
        shards: Of 'hsdp': processes that have one copy of the model between them.

    Raises:
        ValueError: The engine is not known, there are fewer than two processes, or ``shards`` is missing, of no use, or
            does not divide them.
    """
    if engine not in LAYOUTS:
        raise ValueError(f"'{engine}' is not an engine that is known; allowed are {', '.join(LAYOUTS)}.")
    if count < 2:
        raise ValueError(f"processes must be at least 2, got {count}. One process sends nothing.")
    if engine != Hsdp.name:
        if shards is not None:
            raise ValueError(f"shards={shards} has no effect with engine '{engine}'. Take hsdp, or leave it out.")
        return LAYOUTS[engine](count, mixed)
    if shards is None:
        raise ValueError("engine 'hsdp' needs shards: how many processes have one copy of the model between them.")
    if not 1 < shards < count or count % shards:
        allowed = ", ".join(str(n) for n in range(2, count) if count % n == 0)
        raise ValueError(
            f"shards must divide the {count} processes, be more than 1 and fewer than all ({allowed or 'none is'}), "
            f"got {shards}. For 1 take ddp, for all fsdp2."
        )
    return Hsdp(count, mixed, shards)


def fewer(whole: Layout, count: int) -> Layout:
    """The same engine on fewer processes: of 'hsdp' with as many shards, or with all that there are."""
    if isinstance(whole, Hsdp):
        return Hsdp(count, whole.mixed, min(whole.parts, count))
    return type(whole)(count, whole.mixed)


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _like(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _pieces(size: float, limit: float) -> int:
    """Calls that it takes to send so much in buckets."""
    return max(1, -int(-size // limit))
