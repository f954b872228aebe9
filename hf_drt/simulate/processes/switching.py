"""How long a switch takes on many processes: who decomposes what, what is gathered and sent, what all have to merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from torch import nn

from hf_drt.engines import shares
from hf_drt.forms import Dense, Factored, Form, decomposition_shapes, form_of, layer_of, stack_count, weight_shape
from hf_drt.simulate.processes.inventory import Entry, Inventory
from hf_drt.simulate.processes.layouts import Layout
from hf_drt.simulate.processes.links import Machine
from hf_drt.simulate.processes.ring import Collective

_WORKING = 4  # bytes of a number in a decomposition


@dataclass(frozen=True)
class Job:
    """One layer that changes form.

    Attributes:
        cost: By which layers are shared out, ``out * in * min(out, in)``.
        order: Of the symmetric matrix whose eigenvectors its decomposition needs; 0 where the new form needs none.
        products: FLOPs of its decomposition beside that.
        parts: Numbers of the decomposition's result, which its process sends to all.
        merge: FLOPs of forming W from factors, by every process.
        entries: Its parameters before.
        copies: Matrices of which the layer has so many.
    """

    name: str
    cost: float
    order: int
    products: float
    parts: int
    merge: float
    entries: tuple[Entry, ...]
    copies: int = 1

    def seconds(self, machine: Machine) -> float:
        """Of its decomposition."""
        return self.copies * machine.decompose(self.order, self.products) if self.order else 0.0


@dataclass(frozen=True)
class Switch:
    """One switch on so many processes; seconds.

    Attributes:
        layers: That change form, and of them ``decomposed``.
        busiest: Layers that the process with most work decomposes.
        decompositions: By that process; where whole layers are gathered in between, in rounds of which each takes as
            long as its costliest layer.
        merges: By every process.
        gathers, broadcasts: Of whole layers and of the optimizer's state; of results, and of what the engine sends as
            it goes on.
        sent: Bytes that a process sends.
    """

    processes: int
    layers: int
    decomposed: int
    busiest: int
    decompositions: float
    merges: float
    gathers: float
    broadcasts: float
    sent: float

    @property
    def seconds(self) -> float:
        """Of the whole switch."""
        return self.decompositions + self.merges + self.gathers + self.broadcasts


def jobs_of(model: nn.Module, changes: dict[str, Form], have: Inventory) -> list[Job]:
    """The layers of a model that change form, as they are now.

    Args:
        changes: New form by layer (:meth:`hf_drt.DynamicRank.changes`).
        have: Of the model as it is now.
    """
    by_name = {entry.name: entry for entry in have.entries}
    return [_job(name, layer_of(model, name), form, by_name) for name, form in changes.items()]


def _job(name: str, layer: nn.Module, form: Form, by_name: dict[str, Entry]) -> Job:
    d_out, d_in = weight_shape(layer)
    now, copies = form_of(layer), stack_count(layer) or 1
    cost = float(d_out * d_in * min(d_out, d_in))
    parts = decomposition_shapes(layer, form)
    order, products = _decomposition(now, d_out, d_in) if parts is not None else (0, 0.0)
    merged = 0.0 if isinstance(now, Dense) or isinstance(form, Factored) else 2.0 * copies * d_out * d_in * now.rank
    own = [by_name[full] for key, _ in layer.named_parameters() if (full := f"{name}.{key}") in by_name]
    return Job(
        name, cost, order, products, sum(map(prod, parts)) if parts is not None else 0,
        merged, tuple(own), copies,
    )  # fmt: skip


def _decomposition(now: Form, d_out: int, d_in: int) -> tuple[int, float]:
    """Order of the eigenvalue decomposition, and FLOPs beside it, as :mod:`hf_drt.linalg` takes them up to half of full
    rank: of ``W`` its Gram matrix and the products that check the result, ``2 k`` multiply-adds for each of its entries
    with ``k = min(out, in)``; of factors of rank r two QR, ``2 (out + in) r^2`` multiply-adds, and that of r x r."""
    if isinstance(now, Dense) or now.adapts:
        order = min(d_out, d_in)
        return order, 4.0 * d_out * d_in * order
    return now.rank, 4.0 * (d_out + d_in) * now.rank**2


def switch(
    jobs: Sequence[Job], after: Inventory, layout: Layout, machine: Machine, dtype: str, state: float = 0.0
) -> Switch:
    """What a switch takes on the processes of a layout.

    Layers are shared out by :func:`hf_drt.engines.shares`, as the engines do it; one process decomposes all of its
    layers one after the other. Of a model in parts a layer is gathered to be decomposed, and again when its turn comes
    to change.

    Args:
        jobs: The layers that change.
        after: Of the model after the switch.
        dtype: Of the merges' products.
        state: Bytes of the optimizer's state that follows a weight, over those of the weight
            (``moments='project'``).
    """
    owners = shares([job.cost for job in jobs], layout.count)
    own: list[list[Job]] = [[] for _ in range(layout.count)]
    for job, owner in zip(jobs, owners, strict=True):
        own[owner].append(job)
    if layout.shards > 1:  # all meet in every round, to gather
        rounds = zip_longest(*own)
        work = sum(max(job.seconds(machine) for job in row if job is not None) for row in rounds) if jobs else 0.0
    else:
        work = max(sum(job.seconds(machine) for job in mine) for mine in own)
    decomposed = [job for job in jobs if job.order]
    gathers = [g for job in decomposed for g in layout.whole(job.entries, machine)]
    gathers += [g for job in jobs for g in layout.whole(job.entries, machine)]
    for job in jobs if state else ():
        trained = [entry for entry in job.entries if entry.trainable]
        gathers += [g.times(state) for g in layout.whole(trained, machine)]
    ring = machine.ring(layout.count)
    broadcasts = [Collective("broadcast", job.parts * _WORKING, ring, 4) for job in decomposed]
    broadcasts += layout.renewed(after, machine)
    return Switch(
        layout.count,
        len(jobs),
        len(decomposed),
        max(sum(job.order > 0 for job in mine) for mine in own),
        work,
        sum(machine.compute(job.merge, dtype) for job in jobs),
        sum(g.seconds for g in gathers),
        sum(b.seconds for b in broadcasts),
        sum(c.sent for c in (*gathers, *broadcasts)),
    )
