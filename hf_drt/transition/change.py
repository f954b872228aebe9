"""A change of form of many layers: prepared as a whole, then put in force layer by layer.

All that can fail, but for want of memory or a process that dies, comes first, so that a failure leaves model and
optimizer as they were. What is prepared is of low rank; weights of full size are formed one at a time, each in the
place of what it is made of. So the peak of memory is that of the larger of the two phases, plus one layer. A failure in
this second part cannot be undone, since what the weights were made of is gone: it is a :class:`HalfwayError`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_drt.engines import Job, decompositions, gathered, group_of, is_sharded, raise_everywhere, reshard, splice
from hf_drt.forms import Conversion, Form, check, empty_like, layer_of, odd_tensors, own_behaviour, prepare
from hf_drt.optim import carry_groups, carry_moments, put_states, take_states
from hf_drt.targets import Swap, replace

logger = logging.getLogger(__name__)


class HalfwayError(RuntimeError):
    """A change of form has failed after the first layer had changed: the model is of no use any more."""


@dataclass(frozen=True)
class Transition:
    """What one change of phase did. Holds numbers only, so that the old weights can be freed.

    Attributes:
        step: Update step at whose beginning it happened.
        phase: Index of the phase that began, and its ``kind``.
        layers: Layers that changed form.
        seconds: Wall-clock time.
        errors: Relative Frobenius error by truncation, by layer.
        merge_error: Largest share of an update that rounding has cost in a merge (:class:`hf_drt.forms.Conversion`).
        parameters: Trainable parameters of the model, before and after.
        function_error: max |difference| of the probe's output, before to after; None without a probe.
    """

    step: int
    phase: int
    kind: str
    layers: int
    seconds: float
    parameters: tuple[int, int]
    errors: dict[str, float] = field(default_factory=dict)
    merge_error: float = 0.0
    function_error: float | None = None

    @property
    def truncation_error(self) -> float:
        """Largest error of a layer; 0 where nothing was truncated."""
        return max(self.errors.values(), default=0.0)


@dataclass
class Outcome:
    """What a change of form did to the weights.

    Attributes:
        errors: Relative Frobenius error by truncation, by layer.
        merge_error: Largest share of an update that rounding has cost (:class:`hf_drt.forms.Conversion`).
    """

    errors: dict[str, float] = field(default_factory=dict)
    merge_error: float = 0.0

    def add(self, name: str, conversion: Conversion) -> None:
        """Count a layer in, after its commit."""
        self.errors[name] = conversion.error
        self.merge_error = max(self.merge_error, conversion.merge_error)


def change_forms(
    model: nn.Module,
    forms: dict[str, Form],
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    generator: Callable[[str], torch.Generator],
) -> Outcome:
    """Give layers of a model a new form.

    Args:
        model: The model, unwrapped.
        forms: The form of every layer that changes, by name; the form that it is in already means a restart.
        optimizer: The optimizer over the model's trainable parameters, if there is one.
        moments: 'project' or 'reset', see :func:`hf_drt.optim.carry_moments`.
        generator: Gives the random generator of a layer's new directions, by name.

    Raises:
        ValueError: A rank or weight is not valid, the optimizer is not supported or lacks a weight, or a layer's
            parameters are not its own any more. Nothing has changed then.
        HalfwayError: Memory has run out, or another process has died, halfway.
    """
    _look_at(model, forms)
    change = _change_sharded if is_sharded(model) else _change
    return change(model, forms, optimizer, moments, generator)


def _look_at(model: nn.Module, forms: dict[str, Form]) -> None:
    """What a layer did of its own when it was selected has kept it out; what it has got since is told of before it is
    lost. Without its parameters it cannot change at all."""
    for name in forms:
        layer = layer_of(model, name)
        if reason := odd_tensors(layer):
            raise ValueError(
                f"{name} has been changed since it was selected ({reason}), and cannot change form any more. Make all "
                "other changes to the model before, or take this one back."
            )
        if reason := own_behaviour(layer):
            logger.warning(
                "%s has got behaviour of its own since it was selected (%s), which is lost as it changes form. Set it "
                "again after the change, or exclude the layer.",
                name,
                reason,
            )


@contextlib.contextmanager
def _no_way_back() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise HalfwayError(
            f"the change of form failed halfway ({type(error).__name__}: {error}), and some layers have lost their "
            "weights. Start a new process, and resume from the last checkpoint; where memory has run out, with smaller "
            "batches or ranks."
        ) from error


def empty_forms(model: nn.Module, forms: dict[str, Form], optimizer: torch.optim.Optimizer | None = None) -> list[Swap]:
    """Give layers a form whose values are nan until they are loaded; the optimizer, if any, gets the new parameters.

    Returns:
        The swaps made; they keep the old weights alive. Collective for a sharded model.
    """
    _look_at(model, forms)
    swaps = []
    for name, form in forms.items():
        old = layer_of(model, name)
        plain = gathered(old)
        swaps.append(Swap(name, old, _unset(empty_like(plain, form))))
        if plain is not old:
            splice(model, old, plain, swaps[-1].new)
    place = carry_groups(optimizer, model, swaps) if optimizer is not None and swaps else None
    replace(model, swaps)
    if place is not None:
        place()
        for swap in swaps:
            carry_moments(optimizer, swap.old, swap.new, "reset")
    return swaps


def _unset(layer: nn.Module) -> nn.Module:
    """What is not loaded shall not pass for weights. The bias is the old layer's."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "bias":
                parameter.fill_(torch.nan)
    return layer


def _change(
    model: nn.Module,
    forms: dict[str, Form],
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    generator: Callable[[str], torch.Generator],
) -> Outcome:
    conversions = list(_prepared(model, forms, generator))
    swaps = [Swap(name, layer_of(model, name), c.module) for name, c in zip(forms, conversions, strict=True)]
    place = carry_groups(optimizer, model, swaps) if optimizer is not None else None
    outcome = Outcome()
    with _no_way_back():
        replace(model, swaps)
        if place is not None:
            place()
        while swaps:  # popped, so that each old layer is free before the next new weight is formed
            swap, conversion = swaps.pop(0), conversions.pop(0)
            if optimizer is not None:
                carry_moments(optimizer, swap.old, swap.new, moments)
            conversion.commit()
            outcome.add(swap.name, conversion)
    return outcome


def _prepared(
    model: nn.Module, forms: dict[str, Form], generator: Callable[[str], torch.Generator]
) -> Iterator[Conversion]:
    jobs = {name: Job(layer_of(model, name), form) for name, form in forms.items()}
    _check(jobs)
    for (name, job), parts in zip(jobs.items(), decompositions(list(jobs.values())), strict=True):
        yield prepare(job.module, job.form, generator(name), parts)


def _change_sharded(
    model: nn.Module,
    forms: dict[str, Form],
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    generator: Callable[[str], torch.Generator],
) -> Outcome:
    """The same under FSDP2, where a process has room for the whole weights of one layer only. Collective."""
    reshard(model)
    jobs = {name: Job(layer_of(model, name), form) for name, form in forms.items()}
    _check_everywhere(jobs)
    for job in jobs.values():
        group_of(model, job.module)
    if optimizer is not None:
        carry_groups(optimizer, model, [Swap(name, job.module, job.module) for name, job in jobs.items()])
    parts = list(decompositions(list(jobs.values())))
    outcome = Outcome()
    with _no_way_back():
        while jobs:
            name = next(iter(jobs))
            old, form = jobs[name].module, jobs.pop(name).form
            plain = gathered(old)
            conversion = prepare(plain, form, generator(name), parts.pop(0))
            new = conversion.module
            states = take_states(optimizer, old, new, moments, plain) if optimizer is not None else []
            conversion.commit()
            splice(model, old, plain, new)
            swap = Swap(name, old, new)
            place = carry_groups(optimizer, model, [swap]) if optimizer is not None else None
            replace(model, [swap])
            if place is not None:
                place()
                put_states(optimizer, new, states)
            outcome.add(name, conversion)
    return outcome


def _check(jobs: dict[str, Job]) -> None:
    for name, job in jobs.items():
        try:
            check(job.module, job.form)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _check_everywhere(jobs: dict[str, Job]) -> None:
    error = None
    try:
        _check(jobs)
    except ValueError as failure:
        error = failure
    raise_everywhere(error, list(jobs.values()))
