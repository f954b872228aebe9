"""Every form of every kind of layer, forward and backward, against dense mathematics in float64.

A layer is converted on the device; then noise makes sure that nothing in it is zero. The reference is the dense layer
of the effective weight that its tensors make up, in float64 on the CPU, with gradients by autograd, which are held
against central differences themselves. What is computed on the device may be off by a few times what a dense layer is
there.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_drt.doctor.check import Bench, Finding, Value, found, not_tried, raised, told
from hf_drt.doctor.layers import Case, Kind, cases, moved
from hf_drt.doctor.modes import (
    COMPILED,
    MODES,
    Computed,
    Mode,
    batch,
    compute,
    compute_compiled,
    named,
    no_compiler,
    trained,
    unusable,
)
from hf_drt.forms import Dense, Factored, convert, effective_weight, form_of, layout_of, merged

FACTOR = 10  # times the error of a dense layer, or the rounding of one number, whichever is larger
_KEPT = 1e-4  # relative change of W by a conversion that keeps it
_STEP = 1e-4  # of central differences
_SLOPE = 1e-5  # their largest relative difference from autograd


@dataclass(frozen=True)
class _Fault:
    """What is wrong: where, what, by how much, and how much may be."""

    mode: str
    part: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.mode}: {self.part} is off by {self.error:.1e}, and may be by {self.allowed:.1e}"


def check_forms(bench: Bench) -> Iterator[Finding]:
    """One finding for each form of each kind of layer, over all modes; one for each mode that is not tried."""
    usable = []
    for mode in MODES:
        if (why := unusable(mode, bench.device)) is None:
            usable.append(mode)
        else:
            yield not_tried(mode.name, why)
    layers: dict[Case, nn.Module | Finding] = {case: _layer(case, bench.device) for case in cases()}
    why = "left out of a quick look" if bench.quick else no_compiler(bench.device)
    if why is not None:
        yield not_tried(COMPILED.name, why)
    compiled = _compiled(layers, bench.device) if why is None else {}
    dense: dict[tuple[Kind, str], float] = {}
    for case, layer in layers.items():
        yield layer if isinstance(layer, Finding) else _looked_at(case, layer, usable, compiled.get(case), dense, bench)


def _layer(case: Case, device: torch.device) -> nn.Module | Finding:
    """The layer on the CPU, converted on the device, with noise on all its tensors; or what went wrong."""
    try:
        dense = moved(case.kind.layer(), device)
        before = _whole(dense)
        conversion = convert(dense, case.form)
        change = ((_whole(conversion.module) - before).norm() / before.norm()).item()
    except Exception as error:  # whatever a decomposition raises
        return raised(case.name, error)
    truncates = isinstance(case.form, Factored)
    stated = conversion.error if truncates else 0.0
    allowed = 2**-8 if isinstance(case.form, Dense) and case.form.dtype is not None else _KEPT
    if not abs(change - stated) <= allowed:
        part = f"W differs by {change:.1e} from what it was, and should by {stated:.1e}"
        return found(case.name, False, f"conversion: {part}", {"change": change, "stated": stated})
    layer = moved(conversion.module, "cpu")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            spread = float(parameter.float().std().nan_to_num(0.0)) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 + spread) * noise.to(parameter.dtype))
    return layer


def _whole(layer: nn.Module) -> Tensor:
    return effective_weight(layer).detach().cpu().double()


def _compiled(layers: Mapping[Case, nn.Module | Finding], device: torch.device) -> dict[Case, Computed | str]:
    """What the compiler's code computes, by case. If it cannot compile all at once, each alone: so one is named."""
    ready = {
        case: moved(copy.deepcopy(layer), device)
        for case, layer in layers.items()
        if isinstance(layer, nn.Module) and not case.repeats
    }
    try:
        return dict(compute_compiled(ready, device))
    except Exception:  # whichever
        return {case: _compiled_alone(case, layer, device) for case, layer in ready.items()}


def _compiled_alone(case: Case, layer: nn.Module, device: torch.device) -> Computed | str:
    try:
        return compute_compiled({case: layer}, device)[case]
    except Exception as error:  # of torch, of a C++ compiler, of Triton
        return told(error)


def _looked_at(
    case: Case,
    layer: nn.Module,
    modes: list[Mode],
    compiled: Computed | str | None,
    dense: dict[tuple[Kind, str], float],
    bench: Bench,
) -> Finding:
    """One form in all modes. Errors of dense layers are noted in ``dense``, for the forms that come after them."""
    errors: dict[str, float] = {}
    faults: list[_Fault | str] = []

    def judge(mode: Mode, computed: Computed, expected: Computed) -> None:
        part, error = _worst(computed, expected)
        errors[mode.name] = error
        known = dense.setdefault((case.kind, mode.name), error)
        plain = isinstance(case.form, Dense)
        allowed = mode.coarse if plain else FACTOR * max(mode.eps, known)
        if not error <= allowed:
            faults.append(_Fault(mode.name, part, error, allowed))

    try:
        faults += _slopes(case.kind, layer)
    except Exception as error:  # of a form's own code
        faults.append(f"backward in float64: {told(error)}")
    for mode in modes:
        try:
            own = copy.deepcopy(layer)
            if mode.dtype != torch.float32:  # else a W that is kept in fewer bits would be widened
                moved(own, mode.dtype)
            expected = _reference(case.kind, own, mode.dtype)
            judge(mode, compute(mode, case.kind, moved(own, bench.device), *batch(case.kind)), expected)
        except Exception as error:  # of a form's own code, or of a kernel
            faults.append(f"{mode.name}: {told(error)}")
    if isinstance(compiled, str):
        faults.append(f"compile: {compiled}")
    elif compiled is not None:
        judge(COMPILED, compiled, _reference(case.kind, layer, COMPILED.dtype))
    seen = "; ".join(map(str, faults)) or ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    values: dict[str, Value] = dict(errors)
    return found(case.name, not faults, seen, values)


def _reference(kind: Kind, layer: nn.Module, dtype: torch.dtype) -> Computed:
    """What a dense layer of the same effective weight computes, in float64 on the CPU, of inputs in this dtype."""
    x, gradient = (tensor.to(dtype).double() for tensor in batch(kind))
    tensors = {name: p.detach().cpu().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    layout = layout_of(layer)
    own = {name: value for name, value in tensors.items() if name != "bias"}
    W = merged(form_of(layer), own, layout)
    y = kind.dense(x.requires_grad_(), layout.stored(W), tensors.get("bias"))
    weights = {name: tensors[name] for name in trained(layer)}
    return named(y, torch.autograd.grad(y, [x, *weights.values()], gradient), weights)


def _slopes(kind: Kind, layer: nn.Module) -> Iterator[_Fault]:
    """Gradients of the layer's own code in float64 against central differences, along one direction for each tensor."""
    layer = moved(copy.deepcopy(layer), torch.float64)
    x, gradient = (tensor.double() for tensor in batch(kind))
    x = x.requires_grad_()
    tensors: dict[str, Tensor] = {"the input": x} | dict(trained(layer))
    y = kind.apply(layer, x)
    slopes = torch.autograd.grad(y, list(tensors.values()), gradient)
    generator = torch.Generator().manual_seed(3)
    for (name, tensor), slope in zip(tensors.items(), slopes, strict=True):
        random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        direction = slope / slope.norm().clamp_min(1e-300) + random / random.norm()
        expected = (slope * direction).sum().item()
        measured = _difference(kind, layer, x, gradient, tensor, direction)
        error = abs(measured - expected) / max(slope.norm().item(), abs(measured), 1e-12)
        if not error <= _SLOPE:
            yield _Fault("backward in float64", f"gradient of {name}", error, _SLOPE)


@torch.no_grad()
def _difference(kind: Kind, layer: nn.Module, x: Tensor, gradient: Tensor, tensor: Tensor, direction: Tensor) -> float:
    kept, sums = tensor.clone(), []
    for sign in (1, -1):
        tensor.copy_(kept + sign * _STEP * direction)
        sums.append((kind.apply(layer, x) * gradient).sum().item())
    tensor.copy_(kept)
    return (sums[0] - sums[1]) / (2 * _STEP)


def _worst(computed: Computed, expected: Computed) -> tuple[str, float]:
    """The part that is off most, and by how much relative to its norm; inf of what is not finite."""
    errors = {name: _relative(computed[name], value) for name, value in expected.items()}
    return max(errors.items(), key=lambda item: item[1])


def _relative(value: Tensor, expected: Tensor) -> float:
    error = ((value.detach().cpu().double() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
