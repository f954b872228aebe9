"""A DeepSpeed engine taken apart for a change of form, and made anew.

What each process holds of the float32 weights and of the optimizer's state stands in the outer optimizer meanwhile
(:mod:`hf_drt.engines.zero.regrouped`), by parameter, as a :class:`Shard` in the host's memory. Then DeepSpeed makes
another engine with the same configuration, and the parts find their new places. The engine that the Trainer's loop
holds becomes that one.
"""

import contextlib
import gc
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from hf_drt.engines.zero.layout import Place, forget, forget_module, places, shape_of, shaped, stage_of
from hf_drt.engines.zero.regrouped import Regrouped, count_of, inner_groups
from hf_drt.engines.zero.shard import Shard, at_rest

# Counts of the engine's own, which go on: its checkpoints are named by them.
_COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass
class Opened:
    """A model whose engine is taken apart.

    Attributes:
        masters: The float32 values of every trained parameter.
    """

    masters: dict[nn.Parameter, Shard] = field(default_factory=dict)


OPENED: "weakref.WeakKeyDictionary[nn.Module, Opened]" = weakref.WeakKeyDictionary()
_REGROUPED: "weakref.WeakKeyDictionary[nn.Module, Regrouped]" = weakref.WeakKeyDictionary()


def trains(engine: DeepSpeedEngine, regrouped: Regrouped) -> None:
    """An engine that Accelerate has just made works for this optimizer."""
    regrouped.attach(engine.optimizer)
    _REGROUPED[engine] = regrouped


@contextlib.contextmanager
def renewed(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within the block the engine's model may change its parameters, and the outer optimizer holds the state; after it
    the same object trains the new ones. Collective.

    Args:
        engine: One that :func:`trains` knows.
    """
    regrouped, known = _REGROUPED[engine], cast(Any, engine)
    model, config = known.module, known.config
    inner, scaler = regrouped.zero.optimizer, regrouped.zero.loss_scaler
    counts = {name: getattr(engine, name) for name in _COUNTS}
    OPENED[model] = opened = Opened()
    try:
        _take_out(regrouped, opened, known.device)
        _take_apart(engine, model, regrouped)
        with shaped(model):
            yield
        inner.param_groups = inner_groups(
            regrouped.outer.param_groups, lambda p: count_of(regrouped.outer.state.get(p, {})), inner.defaults
        )
        inner.state = defaultdict(dict)
        made: Any = deepspeed.initialize(model=model, optimizer=inner, config=config)[0]
        made.optimizer.loss_scaler = scaler
        _put_back(made.optimizer, regrouped.outer, opened)
    finally:
        del OPENED[model]
    regrouped.outer.state.clear()
    _become(engine, made, counts)
    trains(engine, regrouped)


@torch.no_grad()
def _take_out(regrouped: Regrouped, opened: Opened, device: torch.device) -> None:
    """Float32 values and state of every parameter, as this process has them."""
    states = regrouped.zero.optimizer.state
    for parameter, place in places(regrouped.zero):
        shape = shape_of(parameter)
        opened.masters[parameter] = Shard(at_rest(place.of(place.flat)), place.start, shape, device)
        state = regrouped.outer.state[parameter]
        for key, value in states.get(place.flat, {}).items():
            part = place.entry(value)
            if part is not None:
                state[key] = Shard(at_rest(part), place.start, shape, device)
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value


def _take_apart(engine: DeepSpeedEngine, model: nn.Module, regrouped: Regrouped) -> None:
    """Destroy an engine, and let go of all that keeps its flat tensors alive."""
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:  # destroy() leaves them on the model, where they would fire beside the next engine's
            hook.remove()
    regrouped.detach()
    for parameter in model.parameters():
        forget(parameter)
    for module in model.modules():
        forget_module(module)
    engine.__dict__.clear()
    nn.Module.__init__(engine)
    gc.collect()


@torch.no_grad()
def _put_back(zero: Any, outer: torch.optim.Optimizer, opened: Opened) -> None:
    """Everything that was taken out, and what has begun since, in the new engine's flat tensors. Collective: a part may
    be wanted on another process than the one that has it."""
    states, local = zero.optimizer.state, stage_of(zero) == 3
    for parameter, place in places(zero):
        if parameter.dtype != torch.float32:  # others are their own float32 values
            _write(opened.masters[parameter], place, place.flat, local)
        for key, value in outer.state.get(parameter, {}).items():
            flat_state = states[place.flat]
            if isinstance(value, Shard):
                if key not in flat_state:
                    flat_state[key] = torch.zeros_like(place.flat, dtype=value.values.dtype)
                _write(value, place, flat_state[key], local)
            else:
                flat_state[key] = value


def _write(shard: Shard, place: Place, flat: Tensor, local: bool) -> None:
    part = shard.values if local else shard.whole().view(-1)[place.start : place.start + place.count]
    place.of(flat).copy_(part)


def _become(engine: DeepSpeedEngine, made: DeepSpeedEngine, counts: dict[str, int]) -> None:
    """Everybody who holds ``engine`` shall find the new one: both are one object from now on, seen twice."""
    vars(made).update(counts)
    vars(made)["_drt_twin"] = made  # destroyed when it is collected, and everything with it
    object.__setattr__(engine, "__dict__", vars(made))
