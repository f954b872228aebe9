"""A model's target layers as a plan sees them: names, shapes and counts. The model is looked through once."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import LayerShape, stack_count, weight_shape
from hf_drt.targets import copies, find_targets

Shapes = dict[str, LayerShape]
K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that is not written to: it is handed on, and read in many places."""

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError("what a plan was resolved to does not change. Make a copy: dict(...).")


for _name in ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear"):
    setattr(FrozenDict, _name, _refuse)


@dataclass(frozen=True)
class TargetLayers:
    """The layers that change form. No module: a reference would keep its old weights alive after a switch.

    Attributes:
        shapes: Of every target layer, by name (:class:`hf_drt.forms.LayerShape`).
        copies: How many matrices of that shape it has, and how many multiply a token (:func:`hf_drt.targets.copies`).
        fused: Those that are fused experts.
        skipped: Reason of every linear layer that stays as it is, by name.
        fused_note: What share of the parameters stays dense in fused experts, if any does.
        notes: What is to be warned of (:meth:`hf_drt.Selection.warnings`).
    """

    shapes: FrozenDict[str, LayerShape]
    copies: FrozenDict[str, tuple[int, int]]
    fused: tuple[str, ...]
    skipped: FrozenDict[str, str]
    fused_note: str | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, config: DRTConfig) -> "TargetLayers":
        """Look through a model for them.

        Raises:
            ValueError: As :func:`hf_drt.find_targets`.
        """
        found = find_targets(model, **config.selection)
        return cls(
            shapes=FrozenDict({name: weight_shape(layer) for name, layer in found.targets.items()}),
            copies=FrozenDict({name: copies(model, name, layer) for name, layer in found.targets.items()}),
            fused=tuple(name for name, layer in found.targets.items() if stack_count(layer) is not None),
            skipped=FrozenDict(found.skipped),
            fused_note=found.fused_note(),
            notes=found.warnings(),
        )


class LayersOf:
    """The target layers of one model, looked for once, and again only where the model or the selection is another.

    Between a trainer's construction and its first update step the model is asked for its layers several times. It is
    looked through anew where the trainer makes another model (``model_init``), where something wraps or replaces it,
    and where modules, weights, hooks or attributes of its modules have changed since.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] | None = None
        self._layers: TargetLayers | None = None

    def __call__(self, model: nn.Module, config: DRTConfig) -> TargetLayers:
        """As :meth:`TargetLayers.of`."""
        seen = (weakref.ref(model), config.selection, list(_state(model)))
        if self._layers is None or seen != self._seen:
            self._layers = TargetLayers.of(model, config)
            self._seen = (weakref.ref(model), config.selection, list(_state(model)))
        return self._layers


def _state(model: nn.Module) -> Iterator[tuple]:
    """What decides which layers are targets, in a form that keeps nothing alive; but for flags, as ``training`` and
    the mark that Accelerate leaves."""
    for name, module in model.named_modules():
        trained = [p is not None and p.requires_grad for p in module._parameters.values()]
        held = [(key, _ids(value)) for key, value in vars(module).items() if not isinstance(value, bool)]
        yield name, weakref.ref(module), trained, held


def _ids(held: Any) -> list[int]:
    match held:
        case dict():
            return [*map(id, held), *map(id, held.values())]
        case list() | tuple() | set():
            return list(map(id, held))
    return [id(held)]
