"""Collectives of a ring of processes: the bytes that each sends, and how long it takes."""

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


@dataclass(frozen=True)
class Ring:
    """Processes of which each sends to the next.

    Attributes:
        count: Of processes.
        bandwidth: Bytes per second that each sends, all sending at once.
        latency: Seconds from one process to the next, on average on the way round.
    """

    count: int
    bandwidth: float
    latency: float


def rounds(kind: Kind, count: int) -> int:
    """How often a process of a ring sends in one collective: ``p - 1`` times, ``2 (p - 1)`` in an all-reduce."""
    return (count - 1) * (2 if kind == "all_reduce" else 1)


def sent(kind: Kind, size: float, count: int) -> float:
    """Bytes that each of ``p`` processes sends, of a tensor of ``n`` bytes.

    Of a ring: ``n (p - 1) / p`` in an all-gather of ``n`` bytes, in a reduce-scatter of ``n`` bytes, and on average in
    a broadcast; ``2 n (p - 1) / p`` in an all-reduce, which is the one after the other. No algorithm sends less, but
    where the network itself adds. Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
    operations in MPICH", sections 4.1 to 4.5; Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms".
    """
    return rounds(kind, count) * size / count


@dataclass(frozen=True)
class Collective:
    """One kind of collective of an update step or a switch.

    Attributes:
        size: Bytes of the tensors that are whole, reduced or sent, of all calls together.
        ring: The processes.
        calls: Into how many calls they are cut.
    """

    kind: Kind
    size: float
    ring: Ring
    calls: float = 1

    @property
    def sent(self) -> float:
        """Bytes that a process sends."""
        return sent(self.kind, self.size, self.ring.count)

    @property
    def seconds(self) -> float:
        """``sent / bandwidth + calls * rounds * latency``: the model of Hockney 1994, as Thakur et al. use it. A
        broadcast goes round in pieces, one after the other."""
        waiting = self.calls * rounds(self.kind, self.ring.count) * self.ring.latency
        return self.sent / self.ring.bandwidth + waiting

    def times(self, factor: float) -> "Collective":
        """The same so many times."""
        return replace(self, size=self.size * factor, calls=self.calls * factor)
