"""Sums of ``x x^T`` of layers' inputs in calibration: layers that are given the same tensor share one sum.

In a transformer block the projections to queries, keys and values have one input, and so have gate and up: counted and
kept once, they take a third, or half, of the time and memory.
"""

import contextlib
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance.moments import add_moments, empty_moments
from hf_drt.engines import Engine
from hf_drt.forms import layout_of

logger = logging.getLogger(__name__)


class _Input:
    """Which tensor a layer is given, in which state; the tensor is not kept alive."""

    def __init__(self, x: Tensor):
        self._x = weakref.ref(x)
        self._version = None if x.is_inference() else x._version  # what is made in inference mode does not tell

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Input) or self._version is None:
            return False
        x = self._x()
        return x is not None and x is other._x() and self._version == other._version

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class _Sum:
    """The sum of some layers, all of which have had the same inputs, but for those that wait for the newest.

    Attributes:
        inputs: How many forward passes of a layer are in it; ``count``, how many positions.
        newest: The input that came last.
        waiting: Layers that it has not come to. Only then ``value`` and ``positions`` are kept, to take it out again.
    """

    def __init__(self, total: Tensor, members: set[str]):
        self.total, self.members = total, members
        self.inputs = self.count = self.positions = 0
        self.newest: _Input | None = None
        self.waiting: set[str] = set()
        self.value: Tensor | None = None

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        self.positions = add_moments(self.total, layer, x)
        self.inputs, self.count, self.newest = self.inputs + 1, self.count + self.positions, _Input(x)
        self.waiting = self.members - {name}
        self.value = x.detach().clone() if self.waiting else None  # what follows may change it in place

    def came(self, name: str) -> None:
        self.waiting.discard(name)
        self.value = self.value if self.waiting else None

    def parted(self, names: set[str], layer: nn.Module) -> "_Sum":
        """A sum for those of the waiting layers, without the input that has not come to them."""
        other = _Sum(self.total.neg(), set(names))
        add_moments(other.total, layer, self.value)  # pyright: ignore[reportArgumentType]
        other.total.neg_()
        other.inputs, other.count = self.inputs - 1, self.count - self.positions
        self.members = self.members - names
        for name in names:
            self.came(name)
        return other


class InputSums:
    """Second moments of the inputs that layers have while :meth:`watching`.

    A layer joins another with its first input, if that is the very tensor of which the other's sum is so far. Where a
    later pass gives them different inputs they part, so that each has its own, whatever the model does.
    """

    def __init__(self, layers: Mapping[str, nn.Module], engine: Engine):
        self._layers, self._engine = layers, engine
        self._of: dict[str, _Sum] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers. What torch.compile has compiled runs eagerly meanwhile: its graphs would pass by hooks
        that are newer than they are, in silence."""
        with contextlib.ExitStack() as opened:
            if self._layers and "torch._dynamo" in sys.modules:  # else nothing is compiled
                opened.enter_context(torch.compiler.set_stance("force_eager"))
            for name, layer in self._layers.items():
                hook = partial(self._hook, name)
                opened.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(self, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch._C._current_graph_task_id() == -1:  # no repetition in a backward pass
            with torch.no_grad():
                self._add(name, layer, x)

    def _add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        own = self._of.get(name)
        if own is None:
            self._begin(name, layer, x)
        elif name in own.waiting and own.newest == _Input(x):
            own.came(name)
        else:
            # Those that wait for an input that this is not have their own from here on.
            own = self._part(own, {name} if name in own.waiting else own.waiting, name)
            own.add(name, layer, x)

    def _part(self, own: _Sum, names: set[str], name: str) -> _Sum:
        """The sum of layer ``name``, after all of ``names`` have left the one that they were in."""
        if names:
            other = own.parted(set(names), self._layers[next(iter(names))])
            self._of |= dict.fromkeys(other.members, other)
        return self._of[name]

    def _begin(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """A layer's first input."""
        parameter = next(layer.parameters())
        for other in {id(each): each for each in self._of.values()}.values():
            if other.inputs == 1 and other.newest == _Input(x) and self._alike(layer, next(iter(other.members))):
                other.members.add(name)
                self._of[name] = other
                return
        own = self._of[name] = _Sum(empty_moments(layer, self._engine.device(parameter)), {name})
        own.add(name, layer, x)

    def _alike(self, layer: nn.Module, other: str) -> bool:
        """Whether the same input gives both the same sum: they are linear, and it is kept in one dtype."""
        layers = (layer, self._layers[other])
        dtypes = {next(each.parameters()).dtype for each in layers}
        return len(dtypes) == 1 and not any(layout_of(each).kernel for each in layers)

    def end_pass(self) -> None:
        """A forward pass of the model has ended: layers that had no input in it, where others had, part from them."""
        for own in {id(each): each for each in self._of.values()}.values():
            if own.waiting:
                self._part(own, own.waiting, next(iter(own.members - own.waiting)))

    def means(self) -> dict[str, Tensor]:
        """``E[x x^T]``, ``(n, n)`` or of grouped convolutions ``(groups, n, n)``, one tensor for all that share it; a
        layer that had no input is left out, with a warning. Nothing is kept."""
        if unseen := [name for name in self._layers if name not in self._of]:
            logger.warning(
                "%d layers, such as %s, had no input in the calibration, and are weighed by their weights alone.",
                len(unseen),
                unseen[0],
            )
        taken, self._of = self._of, {}
        means = {id(own): own.total.div_(own.count) for own in {id(each): each for each in taken.values()}.values()}
        found = {name: means[id(own)] for name, own in taken.items()}
        return {name: C[0] if len(C) == 1 else C for name, C in found.items()}
