"""The second moments that a compression goes by, gathered of all layers at once or of one block at a time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_drt.compress.layers import stored, truncated_parts
from hf_drt.compress.objective import Loss, finite_mean
from hf_drt.covariance import checked_batches, covariances_of, sensitivity_of
from hf_drt.forms import Conversion, Dense, Form, layer_of, prepare, stack_count, weight_shape
from hf_drt.forms import form_of as _form_of
from hf_drt.targets import Swap, attention_split, block_roots, replace


class Moments(NamedTuple):
    """Second moments of one layer.

    Attributes:
        C: Of its inputs.
        G: Of the loss's gradients at its outputs; None where they do not count, or it has none.
    """

    C: Tensor | None = None
    G: Tensor | None = None


class Inputs:
    """Second moments of the inputs of a model's layers on calibration batches, as they are asked for.

    Args:
        model: In which the layers are.
        names: Of the layers, in the model's order.
        calibration: Batches; None for a compression by weights alone, which has no moments.
        sequential: Gather those of one group of layers at a time, with the model as it is by then; else all at once, of
            the model as it is first.

    Attributes:
        groups: If ``sequential`` the layers by block, a layer outside of blocks by itself; a block's are parted where
            their second moments would take more memory than its weights. Else all in one.
        sequential: As given.
        batches: The calibration; those of an iterator are kept where they are needed more than once.
        loss: The mean over the batches of the loss that was first asked for, when it was; None before.

    Raises:
        TypeError: The calibration cannot be iterated over.
    """

    def __init__(
        self, model: nn.Module, names: list[str], calibration: Iterable[Any] | None, sequential: bool, again: bool
    ):
        self._model, self.sequential = model, sequential
        self.groups = _by_block(model, names) if sequential else [names]
        self.batches: Any = calibration
        if calibration is not None and (again or sequential):
            self.batches = list(checked_batches(calibration))
        self.loss: float | None = None
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def of(self, names: Iterable[str], loss: Loss | None = None) -> dict[str, Moments]:
        """Those of some layers of one group, by name, which the caller may take out; with a loss ``G`` too."""
        names = list(names)
        if self.batches is None or not names:
            return {}
        if self.sequential:
            kept = self._gathered(names, loss)
        else:
            if self._kept is None or (loss is not None and not self._kept[1]):
                self._kept = self._gathered(self.groups[0], loss)
            kept = self._kept
        C, G = kept
        return {name: Moments(C[name], None if loss is None else G.get(name)) for name in names if name in C}

    def _gathered(self, names: list[str], loss: Loss | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """C, and with a loss G."""
        # Packed attention does not call its projections as layers, and does so for as long as it is split.
        with attention_split(self._model):
            layers, last = self._layers(names), self._last(names)
            if loss is None:
                module = None if last is None else self._model.get_submodule(last)
                return covariances_of(self._model, layers, self.batches, module), {}
            C, G, losses = sensitivity_of(self._model, layers, self.batches, loss)
        if self.loss is None:
            self.loss = finite_mean(losses)
        return C, G

    def _layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: layer_of(self._model, name) for name in names}

    def _last(self, names: list[str]) -> str | None:
        """The block that a group's layers are in, or the layer itself; None of fused experts, and of all layers."""
        if not self.sequential:
            return None
        root = _root(names[0], list(block_roots(self._model)))
        return root if root != names[0] or stack_count(layer_of(self._model, root)) is None else None


def _root(name: str, roots: list[str]) -> str:
    return next((root for root in roots if name.startswith(f"{root}.")), name)


def _by_block(model: nn.Module, names: list[str]) -> list[list[str]]:
    roots, groups = list(block_roots(model)), {}
    for name in names:
        groups.setdefault(_root(name, roots), []).append(name)
    return [part for group in groups.values() for part in _parted(model, group)]


def _parted(model: nn.Module, group: list[str]) -> Iterator[list[str]]:
    """The layers of a block, in order, so that each part's second moments are no larger than the block's weights,
    unless those of one layer are."""
    layers = {name: layer_of(model, name) for name in group}
    room = sum(stored(Dense(), weight_shape(layer)) for layer in layers.values())
    part, taken = [], 0
    for name, layer in layers.items():
        size = (stack_count(layer) or 1) * weight_shape(layer).d_in ** 2
        if part and taken + size > room:
            yield part
            part, taken = [], 0
        part, taken = [*part, name], taken + size
    yield part


class Ready(NamedTuple):
    """A layer's conversion that a trial has made, not in force."""

    layer: nn.Module
    form: Form
    conversion: Conversion


@contextmanager
def tried(model: nn.Module, forms: dict[str, Form], inputs: Inputs, loss: Loss | None) -> Iterator[dict[str, Ready]]:
    """Within, the model computes with its layers truncated to these forms; each layer is back in its place after.

    Args:
        forms: By name, of the layers that lose something by them.
        loss: By which outputs are weighed; None for inputs alone.

    Yields:
        The conversions by name.
    """
    undo: list[Swap] = []
    made: dict[str, Ready] = {}
    with attention_split(model):
        try:
            for group in inputs.groups:
                changing = [n for n in group if n in forms and _form_of(layer_of(model, n)) != forms[n]]
                moments = inputs.of(changing, loss)
                for name in changing:
                    layer, form = layer_of(model, name), forms[name]
                    parts = truncated_parts(layer, form, *moments.pop(name, Moments()))
                    made[name] = Ready(layer, form, prepare(layer, form, parts=parts))
                    new = made[name].conversion.module
                    replace(model, [Swap(name, layer, new)])
                    undo.append(Swap(name, new, layer))
            yield made
        finally:
            for swap in reversed(undo):
                replace(model, [swap])
