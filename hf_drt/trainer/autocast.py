"""A phase's dtype in the Trainer: the model's own ``forward`` runs under the autocast of the phase.

Accelerate sets ``model.forward`` to one that enters its autocast (``bf16=True``) and widens what comes out. Of two
autocasts the inner one counts, so a phase's stands inside of that, around the class's own ``forward``: it is put there
before Accelerate prepares the model, and goes wherever the model is called, ``generate`` and evaluation included.
tests/trainer/test_phase_dtypes_run.py fails first where Accelerate does it in another way.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.precision import autocast
from hf_drt.schedule import AUTO
from hf_drt.trainer.driver import PhaseDriver

Driver = Callable[[], PhaseDriver | None]


class PhaseForward:
    """A model's ``forward`` in the dtype of the phase; outputs in bfloat16 are widened to float32, as Accelerate does.

    A pickled model, and one whose trainer is gone, has its plain ``forward``.

    Args:
        forward: Of the model.
        device: Type of the device that it is on.
        driver: Gives that of the run in progress, or of the last one; None where there is none.
    """

    def __init__(self, forward: Callable[..., Any], device: str, driver: Driver):
        functools.update_wrapper(self, forward)
        self._forward, self.device, self.driver = forward, device, driver

    @torch.compiler.disable(recursive=False)  # which cannot follow it to the run; the model's own forward is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        driver = self.driver()
        if driver is None or driver.dtype is None:
            return self._forward(*args, **kwargs)
        inside = driver.controller.phase is not None  # else training is over
        with driver.controller.autocast(self.device) if inside else autocast(driver.dtype, self.device):
            outputs = self._forward(*args, **kwargs)
        return convert_to_fp32(outputs) if driver.dtype == "bf16" else outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> "PhaseForward":
        return PhaseForward(copy.deepcopy(self._forward, memo), self.device, self.driver)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self._forward,)


def _plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def compute_in_phases(trainer: Any, config: DRTConfig) -> None:
    """Let the trainer's model compute in the dtypes of the schedule's phases, where it has any."""
    reference = weakref.ref(trainer)  # the model may outlive it

    def driver() -> PhaseDriver | None:
        owner = reference()
        return None if owner is None else owner._drt_driver

    _install(trainer.model, trainer.args.device.type, config, driver)


def compute_by(driver: PhaseDriver, model: nn.Module, config: DRTConfig) -> None:
    """The same of a callback's driver, in a Trainer without mixed precision."""
    _install(model, next(model.parameters()).device.type, config, weakref.ref(driver))


def _install(model: nn.Module, device: str, config: DRTConfig, driver: Driver) -> None:
    if not _dtypes(config):
        return
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if (present := _installed(model)) is not None:
        present.driver = driver
        return
    if "_original_forward" in vars(model):
        raise ValueError(
            "Accelerate has prepared this model for mixed precision already, in another trainer, and its autocast "
            "would take the place of a phase's. Load the model anew, or leave the dtypes out of the schedule."
        )
    vars(model)["forward"] = PhaseForward(model.forward, device, driver)


def _installed(model: nn.Module) -> PhaseForward | None:
    """What has been put into a model, be it within Accelerate's own."""
    forward = vars(model).get("forward")
    while forward is not None and not isinstance(forward, PhaseForward):
        forward = getattr(forward, "__wrapped__", None)
    return forward


def _dtypes(config: DRTConfig) -> set[str]:
    return {dtype for dtype in config.parsed.dtypes if dtype is not None} if config.parsed is not None else set()


# ---- what is refused


def refuse_dtypes(trainer: Any, config: DRTConfig) -> None:
    """Raise where phases have dtypes that this trainer's run could not follow, or that contradict its arguments.

    Raises:
        ValueError: Names both, and what to do.
    """
    if _dtypes(config):
        for found in _obstacles(trainer, config):
            raise ValueError(f"the schedule '{config.schedule}' gives dtypes to phases{found}")


def _obstacles(trainer: Any, config: DRTConfig) -> Iterator[str]:
    mixed = trainer.accelerator.mixed_precision
    leave = "leave the dtypes out of the schedule, and set bf16=True for the whole run"
    engine = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if engine is not None:
        yield (
            f", and {engine} casts weights and gradients by a policy of its own, fixed when it takes the model. "
            f"Use DistributedDataParallel (torchrun alone), or {leave}."
        )
    yield from _contradictions(mixed, config)


def _contradictions(mixed: str, config: DRTConfig) -> Iterator[str]:
    dtypes = config.parsed.dtypes if config.parsed is not None else ()
    if mixed in ("fp16", "fp8"):
        why = {"fp16": "whose loss scaler would go on scaling", "fp8": "whose layers are not those of the plan"}[mixed]
        yield f", and the run is in {mixed}, {why}. Leave {mixed} out; phases without a dtype are in fp32 then."
    if mixed == "bf16" and None not in dtypes and "bf16" not in dtypes:
        instead = "the budget chooses it" if AUTO in dtypes else "which is fp32 in all of them"
        yield (
            f", to all, {instead}, so that bf16=True (or ACCELERATE_MIXED_PRECISION=bf16) would have no effect. Leave "
            "one of the two out."
        )


def refuse_dtypes_in_callback(args: Any, config: DRTConfig) -> None:
    """The same for a callback in a plain Trainer.

    Raises:
        ValueError: There is mixed precision beside: a callback comes after Accelerate has prepared the model.
    """
    if _dtypes(config) and args.mixed_precision != "no":
        raise ValueError(
            f"the schedule '{config.schedule}' gives dtypes to phases, and the run is in {args.mixed_precision}, for "
            "which Accelerate has prepared the model before a callback sees it. Use DRTTrainer, or leave "
            f"{args.mixed_precision} out and write the dtype of every phase."
        )
