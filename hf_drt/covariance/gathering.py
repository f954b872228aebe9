"""Gathering: hooks on layers that add up second moments of their inputs while a model is trained."""

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_drt.covariance.moments import add_moments, empty_moments
from hf_drt.engines import Engine, is_joined

logger = logging.getLogger(__name__)
_SUM, _COUNT = "sum.", "count."


class Gathering:
    """Sums of ``x x^T`` of layers' inputs, in the forward passes between :meth:`follow` and :meth:`taken`.

    An input counts once: not where a checkpointed block repeats its forward pass, which happens in the backward pass.
    Only those of layers in training mode count, so that an evaluation in between adds nothing. Each process sees inputs
    of its own; at the end of every update they are added up over all, which end with the same bits.

    While hooks are there, what torch.compile has compiled runs eagerly: its graphs would pass by hooks that are newer
    than they are, in silence.

    Takes ``4 n^2`` bytes for a layer of n inputs, twice that on several processes.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._shares: dict[str, Tensor] = {}  # of this update, where there are several processes
        self._seen: dict[str, int] = {}
        self._open: contextlib.ExitStack | None = None
        self._pending = False

    @property
    def names(self) -> list[str]:
        """The layers whose inputs are, or were, gathered."""
        return list(self._sums)

    def follow(self, layers: Mapping[str, nn.Module], engine: Engine) -> None:
        """An update begins, whose inputs of these layers count; of none where there are none, and what was gathered is
        dropped. Collective where sums are shared.

        Raises:
            ValueError: What was loaded is of layers of other names or shapes.
        """
        self.fold()
        if not layers:
            return self.drop()
        if self._open is None:
            self._begin(layers, engine)
            self._hook(layers)
        self._pending = True

    def _begin(self, layers: Mapping[str, nn.Module], engine: Engine) -> None:
        empty = {name: empty_moments(layer, engine.device(next(layer.parameters()))) for name, layer in layers.items()}
        if not self._sums:
            self._sums, self._counts = empty, dict.fromkeys(layers, 0)
        elif _shapes(self._sums) != _shapes(empty):
            raise ValueError(
                "second moments of inputs were gathered of other layers than are to be truncated next. Resume with the "
                "model and the settings of the run that gathered them."
            )
        self._sums = {name: self._sums[name].to(empty[name].device) for name in layers}
        several = is_joined() and dist.get_world_size() > 1
        self._shares = {name: torch.zeros_like(tensor) for name, tensor in self._sums.items()} if several else {}
        self._seen = dict.fromkeys(layers, 0)

    def _hook(self, layers: Mapping[str, nn.Module]) -> None:
        opened = contextlib.ExitStack()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            opened.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            hook: Callable[..., None] = partial(self._count, opened, name)
            opened.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        self._open = opened

    def _count(
        self, opened: contextlib.ExitStack, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """The hook. One that a copy of a model has brought along is of no gathering any more."""
        repeated = torch._C._current_graph_task_id() != -1  # in a backward pass
        if opened is not self._open or repeated or not layer.training:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        self._seen[name] += add_moments((self._shares or self._sums)[name], layer, x)

    def fold(self) -> None:
        """The update has ended: add what it has seen to the sums. Does nothing if there was none since the last time.
        Collective where sums are shared."""
        if not self._pending:
            return
        self._pending = False
        counts = torch.tensor(list(self._seen.values()), dtype=torch.float64)
        if self._shares:
            counts = counts.to(next(iter(self._shares.values())).device)
            for tensor in (counts, *self._shares.values()):
                dist.all_reduce(tensor)
            for name, share in self._shares.items():
                self._sums[name] += share
                share.zero_()
        for name, count in zip(self._seen, counts.tolist(), strict=True):
            self._counts[name] += int(count)
            self._seen[name] = 0

    def taken(self) -> dict[str, Tensor]:
        """``E[x x^T]``, ``(n, n)`` or of grouped convolutions ``(groups, n, n)``, of every layer that had an input. The
        hooks are gone; the sums stay until :meth:`drop`. Collective where sums are shared."""
        self.fold()
        self._close()
        if unseen := [name for name, count in self._counts.items() if not count]:
            logger.warning(
                "%d layers, such as %s, had no input in the last updates before they are truncated, and are truncated "
                "by their weights alone.",
                len(unseen),
                unseen[0],
            )
        sums = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        return {name: C[0] if len(C) == 1 else C for name, C in sums.items()}

    def drop(self) -> None:
        """No hooks and no sums any more; also where there were none."""
        self._close()
        self._sums, self._counts, self._shares, self._seen = {}, {}, {}, {}
        self._pending = False

    def _close(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or pickle: the sums, without hooks."""
        return vars(self) | {"_open": None}

    # ---- in a checkpoint

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of all updates that have ended; empty where nothing is gathered. Where several processes share them
        the last update is in them after :meth:`fold`, which all have to call."""
        if not self._shares:
            self.fold()
        sums = {_SUM + name: tensor for name, tensor in self._sums.items()}
        return sums | {_COUNT + name: torch.tensor(count) for name, count in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.drop()
        self._sums = {key.removeprefix(_SUM): value.clone() for key, value in state.items() if key.startswith(_SUM)}
        self._counts = {name: int(state[_COUNT + name]) for name in self._sums}


def _shapes(sums: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in sums.items()}
