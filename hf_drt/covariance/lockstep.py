"""Two models on the same batches: moments of what a layer gets in the one against what it gets in the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_drt.covariance.calibration import call, checked_batches, evaluating, stopping_after
from hf_drt.covariance.chain import Passes
from hf_drt.covariance.moments import add_cross_moments, empty_moments


class CrossMoments(NamedTuple):
    """Of one layer.

    Attributes:
        C: ``E[x' x'^T] (n, n)`` of its inputs in the model that changes.
        B: ``E[x x'^T] (n, n)``, with x those in the model that stays.
    """

    C: Tensor
    B: Tensor


@torch.no_grad()
def cross_moments(
    model: nn.Module, reference: nn.Module, names: Iterable[str], passes: Passes
) -> dict[str, CrossMoments]:
    """Second moments of layers' inputs in a model, and crossed with those of the same layers in another.

    Args:
        model: That changes. Both run in evaluation mode.
        reference: With layers of the same names and inputs.
        names: Of linear layers and convolutions without groups, in any form.
        passes: Of both, over the layers, for each batch: :func:`whole_passes`, or of a
            :class:`hf_drt.covariance.Chain`.

    Returns:
        By name; a layer that had no input is left out, and one whose calls in the two models do not go together.
    """
    layers, device = {name: model.get_submodule(name) for name in names}, next(model.parameters()).device
    sums = {name: tuple(empty_moments(layer, device) for _ in range(2)) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def count(name: str, x: Tensor, y: Tensor, before: Tensor) -> None:
        C, B = sums[name]
        counts[name] += add_cross_moments(C, layers[name], x, x)
        add_cross_moments(B, layers[name], before, x)

    apart = _in_lockstep(model, reference, list(layers), passes, lambda x, y: x, count)
    return {
        name: CrossMoments(C[0] / counts[name], B[0] / counts[name])
        for name, (C, B) in sums.items()
        if counts[name] and name not in apart
    }


@torch.no_grad()
def output_errors(model: nn.Module, reference: nn.Module, names: Iterable[str], passes: Passes) -> dict[str, float]:
    """How far the outputs of layers are from what they are in another model: ``||y' - y||_F / ||y||_F`` over all
    batches, with all that the layers before have done to the inputs. Arguments, and which layers are left out, as
    :func:`cross_moments`."""
    names = list(names)
    sums = {name: [0.0, 0.0] for name in names}

    def count(name: str, x: Tensor, y: Tensor, before: Tensor) -> None:
        sums[name][0] += (y.double() - before.double()).square().sum().item()
        sums[name][1] += before.double().square().sum().item()

    apart = _in_lockstep(model, reference, names, passes, lambda x, y: y, count)
    return {n: (lost / total) ** 0.5 for n, (lost, total) in sums.items() if total > 0 and n not in apart}


@torch.no_grad()
def in_order(reference: nn.Module, names: Iterable[str], passes: Passes) -> list[list[str]]:
    """Layers in the order in which the reference calls them, those that are given one and the same input together; by
    the first of the passes. Layers that are not called come last, by themselves."""
    names, inputs = list(names), []

    def tell(name: str, x: Tensor, y: Tensor) -> None:
        inputs.append((name, x))

    with evaluating(reference), _watched(reference, names, tell):
        next(iter(passes))[0]()
    groups: dict[int, list[str]] = {}
    for name, x in inputs:  # which are all held, so that no two have one id
        if not any(name in group for group in groups.values()):
            groups.setdefault(id(x), []).append(name)
    called = [name for group in groups.values() for name in group]
    return [*groups.values(), *([name] for name in names if name not in called)]


def whole_passes(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], last: str | None = None
) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward passes of both for each batch, from the inputs on.

    Args:
        last: Name of a module after which nothing more is computed; None for whole passes.
    """
    modules = [None if last is None else each.get_submodule(last) for each in (reference, model)]
    with stopping_after(modules[0]) as of_reference, stopping_after(modules[1]) as of_model:

        def run(each: nn.Module, one_pass: Callable[[], Any], batch: Any) -> None:
            with one_pass():
                call(each, batch)

        for batch in checked_batches(batches):
            yield partial(run, reference, of_reference, batch), partial(run, model, of_model, batch)


def _in_lockstep(
    model: nn.Module,
    reference: nn.Module,
    names: list[str],
    passes: Passes,
    kept: Callable[[Tensor, Tensor], Tensor],
    count: Callable[[str, Tensor, Tensor, Tensor], None],
) -> set[str]:
    """Call ``count(name, input, output, what is kept of the reference's)`` for every call of a layer in ``model``.

    Returns:
        Layers whose calls do not go together, of which what was counted means nothing: called more often in one of the
        models, or with another number of inputs, as are experts to which other tokens are routed.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}  # call by call

    apart: set[str] = set()

    def compare(name: str, x: Tensor, y: Tensor) -> None:
        before = seen[name].pop(0) if seen[name] else None
        if before is not None and before.shape == kept(x, y).shape:
            count(name, x, y, before)
        else:
            apart.add(name)

    with (
        evaluating(model), evaluating(reference),
        _watched(reference, names, lambda name, x, y: seen[name].append(kept(x, y))),
        _watched(model, names, compare),
    ):  # fmt: skip
        for run_reference, run_model in passes:
            run_reference()
            run_model()
            apart |= {name for name, calls in seen.items() if calls}
            for calls in seen.values():
                calls.clear()
    return apart


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], tell: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within, every call of these layers is told of, by name, input and output."""
    with ExitStack() as undo:
        for name in names:

            def hook(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any], y: Tensor, name: str = name) -> None:
                tell(name, args[0] if args else next(iter(kwargs.values())), y)

            undo.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        yield
