"""A change of form of many layers, by name: decided and checked here, made by :mod:`hf_drt.transition.exchange`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hf_drt.engines import Engine, Job, decompositions, engine_of
from hf_drt.forms import SHOWN, Conversion, Form, check, empty_like, layer_of, odd_tensors, own_behaviour, prepare
from hf_drt.optim import at_averages
from hf_drt.transition.exchange import Change, Outcome, exchange, exchange_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transition:
    """What one change of phase did. Holds numbers only, so that the old weights can be freed.

    Attributes:
        step: Update step at whose beginning it happened.
        phase: Index of the phase that began, and its ``kind``.
        layers: Layers that changed form.
        seconds: Wall-clock time.
        errors: Relative Frobenius error by truncation, by layer; of one that its inputs weigh, that of its outputs.
        merge_error: Largest share of an update that rounding has cost in a merge (:class:`hf_drt.forms.Conversion`).
        rounding_error: Largest relative error by rounding of a weight that was formed, as an adapter's base (there).
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
    rounding_error: float = 0.0
    function_error: float | None = None

    @property
    def truncation_error(self) -> float:
        """Largest error of a layer; 0 where nothing was truncated."""
        return max(self.errors.values(), default=0.0)


def change_forms(
    model: nn.Module,
    forms: dict[str, Form],
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    generator: Callable[[str], torch.Generator],
    look: Callable[[], None] = lambda: None,
    covariances: Mapping[str, Tensor] = MappingProxyType({}),
) -> Outcome:
    """Give layers of a model a new form, at the weights that are to evaluate (:func:`hf_drt.optim.at_averages`).

    Args:
        model: The model, unwrapped.
        forms: The form of every layer that changes, by name; the form that it is in already means a restart.
        optimizer: The optimizer over the model's trainable parameters, if there is one.
        moments: 'project' or 'reset', see :func:`hf_drt.optim.carry_moments`.
        generator: Gives the random generator of a layer's new directions, by name.
        look: Called once the layers have the weights at which they change.
        covariances: Second moments of layers' inputs, by name, by which their truncation is weighed
            (:func:`hf_drt.forms.decompose`); alike on all processes.

    Raises:
        ValueError: A rank or weight is not valid, the optimizer is not supported or lacks a weight, or a layer's
            parameters are not its own any more. Nothing has changed then.
        HalfwayError: Memory has run out, or another process has died, halfway.
        RuntimeError: The model shows its average (:meth:`hf_drt.EMA.averaged`).
    """
    _refuse_shown(model)
    _look_at(model, forms)
    engine = engine_of(model)
    with at_averages(optimizer, (layer_of(model, name) for name in forms)):
        look()
        return exchange(engine, _changes(engine, _checked(engine, forms, covariances), generator), optimizer, moments)


def _refuse_shown(model: nn.Module) -> None:
    if any(SHOWN in vars(module) for module in model.modules()):
        raise RuntimeError(
            "within `with ema.averaged()` the model shows its average, and cannot change form. Leave the block first."
        )


def _checked(engine: Engine, forms: dict[str, Form], covariances: Mapping[str, Tensor]) -> dict[str, Job]:
    """The layers and their new forms, if all can take them, on all processes. Collective where the engine is."""
    jobs = {name: Job(layer_of(engine.model, name), form, covariances.get(name)) for name, form in forms.items()}
    engine.admit([job.module for job in jobs.values()])
    engine.agree(next(filter(None, (_fault(engine, name, job) for name, job in jobs.items())), None))
    return jobs


def _fault(engine: Engine, name: str, job: Job) -> ValueError | None:
    try:
        check(job.module, job.form, engine.held)
    except ValueError as error:
        return ValueError(f"{name}: {error}")
    return None


def _changes(engine: Engine, jobs: dict[str, Job], generator: Callable[[str], torch.Generator]) -> Iterator[Change]:
    """Every layer's change, whose decomposition is there before the first one, and sent to all as it is prepared.
    Collective where there are several processes."""
    for (name, job), parts in zip(jobs.items(), decompositions(engine, list(jobs.values())), strict=True):
        yield Change(name, job.module, job.form, partial(_prepared, job.form, generator(name), parts))


def _prepared(
    form: Form, generator: torch.Generator, parts: Callable[[], tuple[Tensor, ...] | None], layer: nn.Module
) -> Conversion:
    return prepare(layer, form, generator, parts())


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


def empty_forms(model: nn.Module, forms: dict[str, Form], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give layers a form whose values are nan until they are loaded; the optimizer, if any, gets the new parameters.
    Collective for a sharded model.

    Raises:
        ValueError, HalfwayError, RuntimeError: As in :func:`change_forms`.
    """
    _refuse_shown(model)
    _look_at(model, forms)
    exchange_layers(model, {name: (form, partial(_emptied, form)) for name, form in forms.items()}, optimizer)


def _emptied(form: Form, layer: nn.Module) -> Conversion:
    return Conversion(_unset(empty_like(layer, form)), 0.0)


def _unset(layer: nn.Module) -> nn.Module:
    """What is not loaded shall not pass for weights. The bias is the old layer's."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "bias":
                parameter.fill_(torch.nan if parameter.is_floating_point() else 0)  # codes, whose scale is nan
    return layer


def warn_of_rounding(step: int, merge_error: float, frozen_dtype: str | None = None) -> None:
    """Say so where the weights' dtype, or that of frozen ones, is too coarse for what has been learned.

    Args:
        step: At whose beginning layers have changed form.
        merge_error: Of :class:`Transition`.
        frozen_dtype: The setting.
    """
    if merge_error <= 0.1:
        return
    to, way = "the weights' dtype", "Keep the weights in float32, and use bf16 or fp16 autocast."
    if frozen_dtype is not None:
        to = f"frozen_dtype={frozen_dtype}"
        way = f"Take {'bfloat16, or ' if frozen_dtype == 'int8' else ''}no frozen_dtype, or fewer switches."
    logger.warning(
        "update step %d: rounding to %s loses %.0f %% of what goes from a layer's factors into its frozen or dense "
        "weight. %s",
        step,
        to,
        100 * merge_error,
        way,
    )
