"""The exchange of layers: all prepared, all put in the old ones' places, then filled with their weights in turn.

All that can fail, but for want of memory or a process that dies, comes first, so that a failure leaves model and
optimizer as they were. What is prepared is of low rank; weights of full size are formed one at a time, each in the
place of what it is made of. So the peak of memory is that of the larger of the two forms, plus one layer. A failure in
this last part cannot be undone, since what the weights were made of is gone: it is a :class:`HalfwayError`.

Where a process has room for one whole layer only (:attr:`hf_drt.engines.Engine.sharded`), a layer's conversion itself
waits for its turn. Until then an outline stands for the new layer, in the model and in the optimizer.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_drt.engines import Engine, engine_of
from hf_drt.forms import Conversion, Form, empty_like, layer_of
from hf_drt.optim import carry_groups, put_states, stand_ins, take_states
from hf_drt.targets import Places, Swap


class HalfwayError(RuntimeError):
    """A change of form has failed after the first layer had changed: the model is of no use any more."""


@dataclass(frozen=True)
class Change:
    """One layer that is to change form.

    Attributes:
        name: In the model.
        layer: As it is now.
        form: The new one.
        prepare: Makes the conversion of the layer with whole parameters.
    """

    name: str
    layer: nn.Module
    form: Form
    prepare: Callable[[nn.Module], Conversion]


@dataclass
class Outcome:
    """What a change of form did to the weights.

    Attributes:
        errors: Relative Frobenius error by truncation, by layer.
        merge_error: Largest share of an update that rounding has cost (:class:`hf_drt.forms.Conversion`).
        rounding_error: Largest relative error by rounding of a weight that was formed (there).
    """

    errors: dict[str, float] = field(default_factory=dict)
    merge_error: float = 0.0
    rounding_error: float = 0.0

    def add(self, name: str, conversion: Conversion) -> None:
        """Count a layer in, after its commit."""
        self.errors[name] = conversion.error
        self.merge_error = max(self.merge_error, conversion.merge_error)
        self.rounding_error = max(self.rounding_error, conversion.rounding_error)


@dataclass(frozen=True)
class _Turn:
    """One layer's part in an exchange.

    Attributes:
        old: The layer as it is now.
        new: What takes its place in the model: the new layer, or an outline of it.
        prepare: As in :class:`Change`, or gives the conversion that is ready.
    """

    name: str
    old: nn.Module
    new: nn.Module
    prepare: Callable[[nn.Module], Conversion]


def exchange(
    engine: Engine,
    changes: Iterable[Change],
    optimizer: torch.optim.Optimizer | None = None,
    moments: str = "reset",
) -> Outcome:
    """Replace layers of a model by their conversions. Collective where the engine is.

    Args:
        engine: Of the model, unwrapped (:func:`hf_drt.engines.engine_of`); it has admitted the layers.
        changes: Taken one after the other, each prepared before the next is asked for.
        optimizer: The optimizer over the model's trainable parameters, if there is one.
        moments: 'project' or 'reset', see :func:`hf_drt.optim.carry_moments`.

    Raises:
        ValueError: A layer is not in the model, or not in the optimizer, or that is not supported. Nothing has changed.
        HalfwayError: Memory has run out, or another process has died, halfway.
    """
    turns = deque(_turn(engine, change) for change in changes)
    places = Places(engine.model, {turn.name: turn.old for turn in turns})
    enter = _staged(engine, turns, optimizer)
    outcome = Outcome()
    with _no_way_back():
        places.put({turn.name: turn.new for turn in turns})
        substitute = enter()
        while turns:  # popped, so that each old layer is free before the next new weight is formed
            _take(engine, turns.popleft(), places, optimizer, moments, substitute, outcome)
        engine.settle()
    return outcome


def exchange_layers(
    model: nn.Module,
    forms: Mapping[str, tuple[Form, Callable[[nn.Module], Conversion]]],
    optimizer: torch.optim.Optimizer | None = None,
) -> Outcome:
    """:func:`exchange` of layers whose conversions each process prepares for itself; the optimizer's state of them
    begins anew.

    Args:
        forms: By name, the form and what makes the conversion of the layer with whole parameters.
    """
    engine = engine_of(model)
    changes = deque(Change(name, layer_of(model, name), form, make) for name, (form, make) in forms.items())
    engine.admit([change.layer for change in changes])
    # Popped, so that nothing here keeps an old layer alive once its turn has come.
    return exchange(engine, (changes.popleft() for _ in forms), optimizer)


def _turn(engine: Engine, change: Change) -> _Turn:
    if engine.sharded:
        return _Turn(change.name, change.layer, _outline(change.layer, change.form), change.prepare)
    conversion = change.prepare(change.layer)
    return _Turn(change.name, change.layer, conversion.module, lambda plain: conversion)


def _outline(layer: nn.Module, form: Form) -> nn.Module:
    """A layer in another form, but for its weights: no memory is taken. Its bias is the layer's own."""
    bare = copy.copy(layer)
    bare._parameters = {
        name: p if p is None or name == "bias" else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))
        for name, p in layer._parameters.items()
    }
    return empty_like(bare, form)


def _staged(
    engine: Engine, turns: Iterable[_Turn], optimizer: torch.optim.Optimizer | None
) -> Callable[[], Callable[[nn.Module, nn.Module], None]]:
    """Stage the new weights' places in the optimizer. The function returned puts them in force, and gives another by
    which a new layer takes its outline's place."""
    if optimizer is None:
        return lambda: lambda outline, new: None
    place = carry_groups(optimizer, engine.model, [Swap(turn.name, turn.old, turn.new) for turn in turns])
    outlines = [turn.new for turn in turns] if engine.sharded else []

    def enter() -> Callable[[nn.Module, nn.Module], None]:
        place()
        return stand_ins(optimizer, outlines)

    return enter


def _take(
    engine: Engine,
    turn: _Turn,
    places: Places,
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    substitute: Callable[[nn.Module, nn.Module], None],
    outcome: Outcome,
) -> None:
    """One layer's turn: its state, its weight, and its place with the engine."""
    plain = engine.whole(turn.old)
    conversion = turn.prepare(plain)
    new = conversion.module
    states = take_states(optimizer, turn.old, new, moments, engine, plain) if optimizer is not None else []
    conversion.commit()
    engine.install(turn.old, plain, new)
    if new is not turn.new:
        places.put({turn.name: new})
        substitute(turn.new, new)
    if optimizer is not None:
        put_states(optimizer, new, states, engine)
    outcome.add(turn.name, conversion)


@contextlib.contextmanager
def _no_way_back() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise HalfwayError(
            f"the change of form failed halfway ({type(error).__name__}: {error}), and some layers have lost their "
            "weights. Start a new process, and load them again or resume from the last checkpoint; where memory has "
            "run out, with smaller batches or ranks."
        ) from error
