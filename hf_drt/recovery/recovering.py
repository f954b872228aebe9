"""A compressed model brought nearer to the model that it was made of."""

import copy
import inspect
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from hf_drt.compress import Loss, compress, has_loss, mean_loss, model_loss
from hf_drt.covariance import call, checked_batches, evaluating, output_errors, whole_passes
from hf_drt.forms import Factored, form_of, layer_of, stack_count, weight_shape
from hf_drt.recovery.distillation import BATCH, DistillationTrainer, Held, distance, problem_type
from hf_drt.recovery.left_as_it_was import left_as_it_was
from hf_drt.recovery.refit import can_be_refitted, refit
from hf_drt.recovery.result import LayerRecovery, Recovery, Stage
from hf_drt.targets import attention_split, is_layer
from hf_drt.trainer import DRTTrainingArguments

logger = logging.getLogger(__name__)

LEARNING_RATE = 2e-4
ASIDE = 8  # one batch in so many is kept aside
DTYPES = ("fp32", "bf16")
Progress = Callable[[int, int], None]
"""Called with the updates made, and those to make."""


def recover(
    model: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any],
    *,
    training: Iterable[Any] | None = None,
    steps: int = 200,
    learning_rate: float = LEARNING_RATE,
    least_squares: bool = True,
    dtype: str = "fp32",
    loss: Loss | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovery:
    """Bring a model in factored form nearer to a reference, in place: by least squares by layer, then by training.

    1. Least squares (:func:`hf_drt.linalg.refitted`): block after block the factors are fitted to the outputs that the
       layer has in the reference, for the inputs that it has in the model, with the blocks before it already fitted.
    2. Distillation (:class:`DistillationTrainer`): AdamW with a cosine schedule trains the factors, and the biases of
       their layers, so that the model's outputs are those of the reference. All else is frozen meanwhile.

    One batch in eight, if there are four or more, is kept aside: neither step sees it, and one that ends farther from
    the reference on those than it began is undone, with a warning. Of fewer batches all do both.

    Args:
        model: With layers in factored form, such as :func:`hf_drt.compress.compress` leaves it.
        reference: The model as it was before: same structure, dense. It is not changed; memory holds both.
        calibration: Batches as there, for both steps.
        training: More of them, for the distillation alone. It learns a few sequences by heart within some passes: text
            enough for one pass, a batch for each update, brings the model nearer.
        steps: Updates of the distillation, a batch each, at least 0; the batches are gone through as often as it takes.
        learning_rate: Its highest, above 0.
        least_squares: Whether the first step is made.
        dtype: What the training computes in, 'fp32' or 'bf16' (autocast).
        loss: What is told beside the distance: a function of the model and a batch; the model's own if None, where all
            batches give one.
        seed: Of the order of batches, and of dropout.

    Raises:
        ValueError: No layer is in factored form, the two models have other layers or are one, or a value is outside
            its interval. The model is as it was. After an error in one of the steps, or an interruption, it is as
            before that step.
    """
    _check(steps, learning_rate, dtype, least_squares, training)
    batches = list(checked_batches(calibration))
    more = [] if training is None else list(checked_batches(training, "training"))
    names = _factored(model, reference)
    used, aside = _divided(batches)
    with attention_split(reference):  # as it is in the model, so that layers of one name are called in both
        work = _Work(model, reference, names, aside, loss if loss is not None else _own_loss(reference, aside))
        before = work.errors()
        if least_squares:
            work.stage("least squares", lambda: _fitted(work, used))
        if steps:
            work.stage("training", lambda: _trained(work, used + more, steps, learning_rate, dtype, seed, progress))
        after = work.errors()
    ranks = _ranks(model, names)
    told = [name for name in names if name in before and name in after]
    layers = tuple(LayerRecovery(name, ranks[name], (before[name], after[name])) for name in told)
    return Recovery(layers, tuple(work.stages), steps)


def compress_and_recover(
    model: nn.Module,
    *,
    calibration: Iterable[Any],
    recover_steps: int = 200,
    recover_options: Mapping[str, Any] | None = None,
    **criterion: Any,
) -> Recovery:
    """:func:`hf_drt.compress.compress`, then :func:`recover` from a copy of the model as it was; in place.

    Args:
        calibration: Batches, for both; more for the training go into ``recover_options``.
        recover_steps: As ``steps`` there.
        recover_options: Other arguments of it.
        criterion: All other arguments of ``compress``.

    Raises:
        ValueError: As of both; of the second, but for a value outside its interval, the model is compressed.
        TypeError: ``recover`` has no such argument.
    """
    given = inspect.signature(recover).bind(model, model, (), steps=recover_steps, **recover_options or {})
    given.apply_defaults()  # looked at now, not after a long compression
    _check(*(given.arguments[name] for name in ("steps", "learning_rate", "dtype", "least_squares", "training")))
    batches = list(checked_batches(calibration))
    reference = copy.deepcopy(model)
    compression = compress(model, calibration=batches, **criterion)
    recovery = recover(model, reference, batches, steps=recover_steps, **recover_options or {})
    losses = None
    if compression.loss is not None:
        with evaluating(model), torch.no_grad():
            losses = *compression.loss, float(criterion["evaluate"](model))
    return replace(recovery, compression=compression, losses=losses)


# ---- what is given


def _check(steps: int, learning_rate: float, dtype: str, least_squares: bool, training: Iterable[Any] | None) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}.")
    if not (isinstance(learning_rate, (int, float)) and learning_rate > 0):
        raise ValueError(f"learning_rate must be above 0, got {learning_rate!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if not steps and training is not None:
        raise ValueError("training has no effect with steps=0. Raise steps, or leave training out.")
    if not steps and not least_squares:
        raise ValueError("steps=0 and least_squares=False leave nothing to do. Raise steps, or leave least_squares on.")


def _factored(model: nn.Module, reference: nn.Module) -> list[str]:
    """The layers in factored form, which the reference has to have too."""
    if reference is model:
        raise ValueError("the reference is the model itself. Make a copy of the model before it is compressed.")
    names = [name for name, module in model.named_modules() if isinstance(form_of(module), Factored)]
    if not names:
        raise ValueError("no layer of the model is in factored form: there is nothing to recover. Compress it first.")
    with attention_split(reference):
        if missing := [name for name in names if not _alike(layer_of(model, name), reference, name)]:
            raise ValueError(
                f"the reference has no layer '{missing[0]}' of the same shape, which the model has in factored form. "
                "Give the model as it was before the compression."
            )
    return names


def _alike(layer: nn.Module, reference: nn.Module, name: str) -> bool:
    """Whether the reference, which may be frozen, has a layer of that name and shape."""
    try:
        other = layer_of(reference, name)
    except AttributeError:
        return False
    return (is_layer(other) or stack_count(other) is not None) and weight_shape(other) == weight_shape(layer)


def _ranks(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    forms = {name: form_of(layer_of(model, name)) for name in names}
    return {name: form.rank for name, form in forms.items() if isinstance(form, Factored)}


def _divided(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """What is worked with, and what is kept aside to judge by."""
    if len(batches) < 4:
        return batches, batches
    numbers = range(len(batches))[ASIDE // 2 :: ASIDE] or range(len(batches))[-1:]
    return [batch for number, batch in enumerate(batches) if number not in numbers], [batches[i] for i in numbers]


def _own_loss(reference: nn.Module, batches: list[Any]) -> Loss | None:
    return model_loss if all(has_loss(reference, [batch]) for batch in batches) else None


# ---- the steps


class _Work:
    """A model on its way: measured after each stage, and put back where one has done harm."""

    def __init__(self, model: nn.Module, reference: nn.Module, names: list[str], aside: list[Any], loss: Loss | None):
        self.model, self.reference, self.names, self.loss = model, reference, names, loss
        self._aside = aside
        self.stages = [self._measured("dense", reference), self._measured("compressed", model)]
        if not math.isfinite(self.stages[1].distance):
            raise ValueError(
                "the model's outputs, or the reference's, hold inf or nan on batches that are kept aside: there is "
                "nothing to judge a recovery by. Look for inputs that overflow, or hold nan themselves."
            )

    def errors(self) -> dict[str, float]:
        """Relative errors of the layers' outputs; fused experts have none, since they are given other tokens."""
        called = [name for name in self.names if stack_count(layer_of(self.model, name)) is None]
        return output_errors(self.model, self.reference, called, whole_passes(self.model, self.reference, self._aside))

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do it, and keep it if the model is nearer to the reference than before."""
        before = {name: _state(layer_of(self.model, name)) for name in self.names}
        best = min(stage.distance for stage in self.stages[1:])
        started = time.perf_counter()
        try:
            work()
        except BaseException:  # an interruption too: no layer is left half trained
            self._put_back(before)
            raise
        seconds = time.perf_counter() - started
        stage = self._measured(name, self.model, seconds)
        kept = stage.distance < best
        self.stages.append(Stage(name, stage.distance, stage.loss, seconds, kept))
        if not kept:
            logger.warning(
                "%s has brought the model no nearer to the reference, on batches kept aside (distance %.4f, before "
                "%.4f), and is undone. Give more calibration batches, or a lower learning_rate.",
                name,
                stage.distance,
                best,
            )
            self._put_back(before)

    def _put_back(self, states: Mapping[str, dict[str, torch.Tensor]]) -> None:
        for name, state in states.items():
            layer_of(self.model, name).load_state_dict(state)

    def _measured(self, name: str, model: nn.Module, seconds: float = 0.0) -> Stage:
        far = max(mean_loss(model, self._aside, self._distance), 0.0)  # which rounding may leave below
        return Stage(name, far, None if self.loss is None else mean_loss(model, self._aside, self.loss), seconds)

    def _distance(self, model: nn.Module, batch: Any) -> torch.Tensor:
        wanted = call(self.reference, batch)  # may tell the configuration what problem it is, by the labels
        return distance(call(model, batch), wanted, batch, problem_type(self.reference))


def _state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def _fitted(work: _Work, batches: Sequence[Any]) -> None:
    names = [name for name in work.names if can_be_refitted(layer_of(work.model, name))]
    refit(work.model, work.reference, names, batches)


def _trained(
    work: _Work, batches: list[Any], steps: int, learning_rate: float, dtype: str, seed: int, progress: Progress | None
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder, left_as_it_was(work.model), only_trained(work.model, work.names),
        torch.enable_grad(),
    ):  # fmt: skip
        arguments = DRTTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=1, learning_rate=learning_rate,
            lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.0, bf16=dtype == "bf16", seed=seed,
            use_cpu=next(work.model.parameters()).device.type == "cpu", save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=work.model, args=arguments, train_dataset=batches, data_collator=_one_batch, reference=work.reference,
            callbacks=[] if progress is None else [_Told(progress)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # disable_tqdm asks for it; progress tells enough
        trainer.train()


def _one_batch(items: list[Any]) -> Mapping[str, Any]:
    (batch,) = items
    return batch if isinstance(batch, Mapping) else {BATCH: Held(batch)}


@contextmanager
def only_trained(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within, no parameter but those of these layers asks for a gradient, and each asks as before after."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    own = {id(parameter) for name in names for parameter in layer_of(model, name).parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in own)
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
            if id(parameter) in own:
                parameter.grad = None
        for module, training in modes:
            module.training = training


class _Told(TrainerCallback):
    def __init__(self, progress: Progress):
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)
