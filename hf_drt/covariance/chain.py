"""Two models through their blocks, one block at a time: each is run from what the one before it gave, not from the
model's inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance.calibration import call, evaluating

Passes = Iterable[tuple[Callable[[], Any], Callable[[], Any]]]
"""For each batch, a function that runs the reference and one that runs the model."""
_INPUT = object()  # stands for the hidden states among a block's arguments
_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class _Call:
    """How a block was called, but for its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def output(self, block: nn.Module, x: Tensor) -> Tensor:
        args = (x if value is _INPUT else value for value in self.args)
        return _hidden(block(*args, **{name: x if value is _INPUT else value for name, value in self.kwargs.items()}))


@dataclass
class _Seen:
    """One forward pass, block by block."""

    calls: list[_Call] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    order: list[str] = field(default_factory=list)


class Chain:
    """A model and a reference at the same block, with the hidden states that it gets in each, batch by batch.

    Args:
        models: The model that changes, and the one that does not.
        calls: By batch, how each block is called.
        inputs: Of the first block, by batch; alike in both.
    """

    def __init__(self, models: tuple[nn.Module, nn.Module], calls: list[dict[str, _Call]], inputs: list[Tensor]):
        self._models, self._calls = models, calls
        self._inputs = [list(inputs), list(inputs)]

    def passes(self, name: str) -> Passes:
        """The block's, with what it gets now."""
        for batch in range(len(self._calls)):
            yield (lambda batch=batch: self._output(1, name, batch)), (lambda batch=batch: self._output(0, name, batch))

    @torch.no_grad()
    def move_on(self, name: str) -> None:
        """Past the block, by its weights as they are now."""
        for side, model in enumerate(self._models):
            with evaluating(model):
                self._inputs[side] = [self._output(side, name, batch) for batch in range(len(self._calls))]

    def _output(self, side: int, name: str, batch: int) -> Tensor:
        return self._calls[batch][name].output(self._models[side].get_submodule(name), self._inputs[side][batch])


@torch.no_grad()
def chained(model: nn.Module, reference: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> Chain | None:
    """The two models before the first of their blocks; None where they are no plain chain of blocks.

    They are one if each block is called once, gets the hidden states that the one before it gave, and all else that it
    is given does not depend on the blocks (shown by the first batch, for which it is alike in both); and if blocks that
    are called by themselves give the same bits as in the model. A cache of keys and values is left out.

    Args:
        model, reference: Of the same structure, with the same weights outside of blocks.
        names: Of the blocks, in order.
        batches: As of :func:`hf_drt.covariance.covariances_of`.
    """
    calls, inputs = [], []
    for number, batch in enumerate(batches):
        seen = _seen(reference, names, batch)
        if seen is None or (number == 0 and not _is_chain(model, reference, names, batch, seen)):
            return None
        calls.append(dict(zip(names, seen.calls, strict=True)))
        inputs.append(seen.inputs[0])
    return Chain((model, reference), calls, inputs) if calls else None


def _is_chain(model: nn.Module, reference: nn.Module, names: Sequence[str], batch: Any, seen: _Seen) -> bool:
    other = _seen(model, names, batch)
    if other is None or not torch.equal(seen.inputs[0], other.inputs[0]):
        return False
    if not all(_alike([a.args, a.kwargs], [b.args, b.kwargs]) for a, b in zip(seen.calls, other.calls, strict=True)):
        return False
    x = seen.inputs[0]
    with evaluating(reference):
        for name, made in zip(names, seen.calls, strict=True):
            x = made.output(reference.get_submodule(name), x)
    return torch.equal(x, _hidden(seen.outputs[-1]))


def _seen(model: nn.Module, names: Sequence[str], batch: Any) -> _Seen | None:
    """One forward pass; None if its blocks are no chain, or are given what cannot be given again."""
    seen = _Seen()

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Any = args[0] if args else kwargs.get("hidden_states")
        seen.order.append(name)
        seen.inputs.append(x)
        kept = {name: _kept(value, x) for name, value in kwargs.items()}
        seen.calls.append(_Call(tuple(_kept(value, x) for value in args), kept))

    with ExitStack() as undo, evaluating(model):
        for name in names:
            block = model.get_submodule(name)
            undo.callback(
                block.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                ).remove
            )
            undo.callback(block.register_forward_hook(lambda m, args, y: seen.outputs.append(y)).remove)
        call(model, batch)
    linked = isinstance(seen.inputs[0], Tensor) if seen.inputs else False
    linked = linked and all(_hidden(y) is x for y, x in zip(seen.outputs, seen.inputs[1:], strict=False))
    known = all(_is_plain([made.args, made.kwargs]) for made in seen.calls)
    return seen if seen.order == list(names) and linked and known else None


def _kept(value: Any, x: Any) -> Any:
    """An argument as it is given again: without hidden states, and without a cache, which would grow."""
    if value is x:
        return _INPUT
    return None if hasattr(value, "get_seq_length") else value


def _hidden(y: Any) -> Any:
    """A block's hidden states among its outputs."""
    return y[0] if isinstance(y, (tuple, list)) and y else y


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return (
        all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else value is _INPUT or isinstance(value, _PLAIN)
    )


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or (not isinstance(a, Tensor) and a == b)
