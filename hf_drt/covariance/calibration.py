"""Second moments of layers' inputs over batches that are given, of a model that is not trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.covariance.experts import ExpertMoments, stacks_of, told
from hf_drt.covariance.input_sums import InputSums
from hf_drt.engines import engine_of
from hf_drt.forms import place_of


@torch.no_grad()
def covariances_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], last: nn.Module | None = None
) -> dict[str, Tensor]:
    """``E[x x^T]`` of the inputs of layers over batches, which are taken one by one: none is kept.

    Args:
        model: Called with each batch, in evaluation mode and without gradients; every module's own mode is put back.
        layers: Linear layers, convolutions and fused experts of it, in any form, by name.
        batches: Each a mapping, for ``model(**batch)``, a tuple or list, for ``model(*batch)``, or one tensor. Tensors
            are moved to where the model is. Several processes take batches of their own, and nothing is sent.
        last: A module of the model after which nothing more is to be computed, since all the layers are in it or come
            before it.

    Returns:
        ``(n, n)`` by name, in float32 or better, the same tensor for layers that share their input: not to be changed
        in place. Of grouped convolutions ``(groups, n, n)``. Of fused experts
        ``(E, n, n)``, of expert e the sum over the tokens that are routed to it, divided by the number of all tokens:
        so the most used weigh most. A layer that had no input is left out, with a warning.

    Raises:
        ValueError: There is no batch.
        TypeError: ``batches`` cannot be iterated over, or holds something else.
    """
    stacks = stacks_of(layers)
    plain = {name: layer for name, layer in layers.items() if name not in stacks}
    inputs, experts = InputSums(plain, engine_of(model)), ExpertMoments(stacks)
    with (
        evaluating(model),
        told(model, stacks, experts.add, lambda name, expert, y: y),
        tokens_counted(model, stacks) as tokens,
        stopping_after(last) as one_pass,
        inputs.watching(),
    ):
        for batch in checked_batches(batches):
            with one_pass():
                call(model, batch)
            inputs.end_pass()
    found = inputs.means() | {name: C.div_(tokens[name]) for name, C in experts.sums.items() if tokens[name]}
    return {name: found[name] for name in layers if name in found}


def checked_batches(batches: Any, name: str = "calibration") -> Iterator[Any]:
    """The batches, one after the other; errors call them by this name.

    Raises:
        ValueError: There is none.
        TypeError: They cannot be iterated over.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor, str)):
        raise TypeError(
            f"{name} must be an iterable of batches, got a {type(batches).__name__}. Of a single batch make a "
            "list: [batch]."
        )
    count = 0
    for batch in batches:
        yield batch
        count += 1
    if not count:
        raise ValueError(f"{name} has no batch. An iterator that has been used up gives none: make a new one.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and each back in its own after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, whose tensors are moved to where it is.

    Raises:
        TypeError: The batch is none of a mapping, a tuple or list, or a tensor.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{name: _on(value, device) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(_on(value, device) for value in batch))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    raise TypeError(
        f"a batch of calibration must be a mapping, a tuple or list, or a tensor, got a {type(batch).__name__}."
    )


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def tokens_counted(model: nn.Module, stacks: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Within, how many tokens have come to the experts of each layer, routed to whichever."""
    counts = dict.fromkeys(stacks, 0)
    with ExitStack() as undo:
        for name in stacks:

            def count(owner: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                counts[name] += x.shape[:-1].numel()

            owner, _ = place_of(model, name)
            undo.callback(owner.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield counts


class _Enough(Exception):
    """A forward pass has got as far as it is needed."""


@contextmanager
def stopping_after(last: nn.Module | None) -> Iterator[Callable[[], Any]]:
    """Gives a context for each forward pass, which ends after ``last``, a module of the model; None for whole ones.

    How often it is called in a forward pass, the first one shows, which is whole.
    """
    calls, expected = 0, None

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == expected:
            raise _Enough

    @contextmanager
    def one_pass() -> Iterator[None]:
        nonlocal calls, expected
        calls = 0
        with suppress(_Enough):
            yield
        expected = calls

    if last is None:
        yield one_pass
        return
    handle = last.register_forward_hook(hook)
    try:
        yield one_pass
    finally:
        handle.remove()
