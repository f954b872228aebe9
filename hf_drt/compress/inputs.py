"""The second moments that a compression goes by, gathered of all layers at once or of one block at a time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_drt.compress.objective import Loss
from hf_drt.covariance import checked_batches, covariances_of, output_gradients_of
from hf_drt.forms import Form, decompose, layer_of, prepare, stack_count
from hf_drt.forms import form_of as _form_of
from hf_drt.targets import Swap, attention_split, block_roots, replace


class Inputs:
    """Second moments of the inputs of a model's layers on calibration batches, as they are asked for.

    Args:
        model: In which the layers are.
        names: Of the layers, in the model's order.
        calibration: Batches; None for a compression by weights alone, which has no moments.
        sequential: Gather those of one group of layers at a time, with the model as it is by then; else all at once, of
            the model as it is first.

    Attributes:
        groups: The layers by block, a layer outside of blocks by itself, if ``sequential``; else all in one.
        batches: The calibration; those of an iterator are kept where they are needed more than once.

    Raises:
        TypeError: The calibration cannot be iterated over.
    """

    def __init__(
        self, model: nn.Module, names: list[str], calibration: Iterable[Any] | None, sequential: bool, again: bool
    ):
        self._model, self._sequential = model, sequential
        self.groups = _by_block(model, names) if sequential else [names]
        self.batches: Any = calibration
        if calibration is not None and (again or sequential):
            self.batches = list(checked_batches(calibration))
        self._kept: dict[str, Tensor] | None = None

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """``C`` of the inputs of some layers of one group, by name, which the caller may take out."""
        names = list(names)
        if self.batches is None or not names:
            return {}
        if self._sequential:
            return self._gathered(names, self._last(names))
        if self._kept is None:
            self._kept = self._gathered(self.groups[0], None)
        return {name: self._kept[name] for name in names if name in self._kept}

    def gradients_of(self, names: Iterable[str], loss: Loss) -> dict[str, Tensor]:
        """``G`` at the outputs of some layers, by name (:func:`hf_drt.covariance.output_gradients_of`)."""
        with attention_split(self._model):
            return output_gradients_of(self._model, self._layers(names), self.batches, loss)

    def _gathered(self, names: list[str], last: str | None) -> dict[str, Tensor]:
        # Packed attention does not call its projections as layers, and does so for as long as it is split.
        with attention_split(self._model):
            module = None if last is None else self._model.get_submodule(last)
            return covariances_of(self._model, self._layers(names), self.batches, module)

    def _layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: layer_of(self._model, name) for name in names}

    def _last(self, names: list[str]) -> str | None:
        """The block that the layers of a group are in, or the layer itself; no module is fused experts'."""
        root = _root(names[0], list(block_roots(self._model)))
        return root if root != names[0] or stack_count(layer_of(self._model, root)) is None else None


def _root(name: str, roots: list[str]) -> str:
    return next((root for root in roots if name.startswith(f"{root}.")), name)


def _by_block(model: nn.Module, names: list[str]) -> list[list[str]]:
    roots, groups = list(block_roots(model)), {}
    for name in names:
        groups.setdefault(_root(name, roots), []).append(name)
    return list(groups.values())


@contextmanager
def tried(model: nn.Module, forms: dict[str, Form], inputs: Inputs) -> Iterator[None]:
    """Within, the model computes with its layers truncated to these forms; each layer is back in its place after.

    Args:
        forms: By name, of the layers that lose something by them.
    """
    undo: list[Swap] = []
    with attention_split(model):
        try:
            for group in inputs.groups:
                changing = [n for n in group if n in forms and _form_of(layer_of(model, n)) != forms[n]]
                moments = inputs.of(changing)
                for name in changing:
                    layer, form = layer_of(model, name), forms[name]
                    new = prepare(layer, form, parts=decompose(layer, form, moments.pop(name, None))).module
                    replace(model, [Swap(name, layer, new)])
                    undo.append(Swap(name, new, layer))
            yield
        finally:
            for swap in reversed(undo):
                replace(model, [swap])
