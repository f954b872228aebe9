"""One model type: build it, feed it, take it through all forms, and say what came of it."""

import time
import traceback
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_drt.targets import find_targets
from tests.sweep.catalog import model_class
from tests.sweep.cycle import Blind, Fault, forward, run_cycle
from tests.sweep.inputs import NoInput, learned, make_inputs
from tests.sweep.shrink import VARIANTS, Variant, tiny_config

PASSED, NOTHING, UNBUILT, FAILED = "passed", "nothing to select", "not built", "failed"
OUTCOMES = (PASSED, NOTHING, UNBUILT, FAILED)
LIMIT = 60_000_000  # parameters
TRAINING = {"reformer"}  # its backward pass refuses evaluation mode; its tiny configuration has no dropout


@dataclass
class Result:
    """What came of one model type.

    Attributes:
        outcome: One of :data:`OUTCOMES`; 'not built' means that no tiny model of it could be made to run, or none
            whose outputs depend on its target layers.
        cause: Why it is not 'passed'.
        facts: As :func:`tests.sweep.cycle.run_cycle`; and ``parameters``, ``inputs`` (names), ``dtype``,
            ``enlivened`` (whether by :func:`enlivened`).
    """

    model_type: str
    model: str
    outcome: str
    cause: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def attempt(model_type: str, name: str) -> Result:
    """Try one model type, in this process."""
    result, started = Result(model_type, name, UNBUILT), time.perf_counter()
    try:
        model, inputs, variant = built(model_type, name)
        result.facts |= {
            "variant": vars(variant),
            "parameters": sum(p.numel() for p in model.parameters()),
            "inputs": sorted(inputs),
        }
        result.outcome = FAILED
        try:
            _cycle(result, model_type, name, model, inputs)
        except Blind:
            model, inputs, _ = built(model_type, name)
            result.facts["enlivened"] = True
            _cycle(result, model_type, name, enlivened(model), inputs)
    except Blind as error:
        result.outcome, result.cause = UNBUILT, str(error)
    except Exception as error:
        result.cause = _cause(error)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def _cycle(result: Result, model_type: str, name: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    try:
        find_targets(model)
    except ValueError as error:
        result.outcome, result.cause = NOTHING, str(error).partition("left out as follows: ")[2].partition(". incl")[0]
        return
    result.facts["dtype"] = "float32"
    try:
        result.facts |= run_cycle(model, inputs, type(model).from_pretrained)
    except Fault:
        # A choice by the largest score turns a rounding error into another output: only double precision tells.
        model, inputs, _ = built(model_type, name)
        model = enlivened(model) if result.facts.get("enlivened") else model
        model, inputs = model.double(), {n: _double(value) for n, value in inputs.items()}
        options = {"experts_implementation": "eager"} if model._can_set_experts_implementation() else {}
        if options:  # grouped products on a CPU take no float64
            model.set_experts_implementation("eager")
        try:
            forward(model, inputs)
        except Exception as error:
            raise Fault(f"in float32 only, since float64 does not run ({_cause(error)})") from None
        result.facts["dtype"] = "float64"
        result.facts |= run_cycle(model, inputs, partial(type(model).from_pretrained, **options))
    result.outcome = PASSED


def enlivened(model: nn.Module) -> nn.Module:
    """The model with weights at unit gain.

    Default initial values as small as SAM's (1e-10), or those of a deep network without normalisation, let no signal of
    a layer come through to the outputs. Scales of one number a channel that begin near zero become 1.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif 0 < parameter.abs().max() < 1e-2:
                parameter.fill_(1.0)
    return model


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def built(model_type: str, name: str) -> tuple[nn.Module, dict[str, Any], Variant]:
    """A tiny model in evaluation mode, inputs that its forward pass takes, and how far it had to be shrunk.

    Raises:
        Exception: Whatever the architecture raises, of the smallest variant, if none runs.
    """
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            return *_variant(model_type, name, variant), variant
        except (ImportError, NoInput, NotImplementedError):  # no size helps
            raise
        except Exception as error:
            first = first or error
    raise first


def _variant(model_type: str, name: str, variant: Variant) -> tuple[nn.Module, dict[str, Any]]:
    cls = model_class(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(tiny_config(model_type, variant)).parameters())
    if size > LIMIT:
        raise ValueError(f"{size:,} parameters after shrinking, more than {LIMIT:,}")
    torch.manual_seed(0)
    model, hints = cls(tiny_config(model_type, variant)).train(model_type in TRAINING), {}
    for _ in range(5):
        inputs = make_inputs(model, hints, variant.text_only)
        try:
            with torch.no_grad():
                forward(model, inputs)
            return model, inputs
        except (ValueError, RuntimeError) as error:
            wanted = learned(str(error))
            if not wanted or wanted.items() <= hints.items():
                raise
            hints |= wanted
    raise ValueError(f"no inputs fit: {hints}")


def _cause(error: Exception) -> str:
    """Type and first line of an error, and the last line of an architecture's own code on its way."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/transformers/" in f.filename]
    where = f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{where}"
