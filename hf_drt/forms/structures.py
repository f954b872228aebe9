"""Structures: what tensors a form is made of, and how they make up ``W (out, in)``. Tensors in, tensors out."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from hf_drt.forms.layout import Layout
from hf_drt.forms.specs import Adapter, Dense, Factored, Form

AXES = {1: ("width",), 2: ("height", "width")}
# Of all low-rank forms.
NAMES = (
    "U", "V", "base", "lora_A", "lora_B",
    "tucker_in", "tucker_core", "tucker_out", "lora_in", "lora_core", "lora_out",
    "cp_in", "cp_height", "cp_width", "cp_out", "lora_height", "lora_width",
)  # fmt: skip


def tensor_shapes(form: Form, shape: tuple[int, int], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's stored tensors, bias aside, for a layer of shape ``(out, in)``."""
    stored = layout.shape(*shape)
    if isinstance(form, Dense):
        return {"weight": stored}
    product = {name: (*layout.lead, *size) for name, size in _product_shapes(form, shape, layout.kernel).items()}
    return {"base": stored} | product if isinstance(form, Adapter) else product


def _product_shapes(
    form: Factored | Adapter, shape: tuple[int, int], kernel: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    (out, into), rank = shape, form.rank
    channels = into // prod(kernel)
    prefix = "lora" if isinstance(form, Adapter) else form.decomposition
    match form.decomposition:
        case "tucker":
            core = (rank, form.rank_in, *kernel)
            return {f"{prefix}_in": (form.rank_in, channels), f"{prefix}_core": core, f"{prefix}_out": (out, rank)}
        case "cp":
            axes = {f"{prefix}_{axis}": (rank, size) for axis, size in zip(AXES[len(kernel)], kernel, strict=True)}
            return {f"{prefix}_in": (rank, channels), **axes, f"{prefix}_out": (out, rank)}
    if isinstance(form, Adapter):
        return {"lora_A": (rank, into), "lora_B": (out, rank)}
    return {"U": (out, rank), "V": (rank, into)}


def halves(form: Factored | Adapter, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``L (out, r)`` and ``R (r, in)`` with ``W = L R``, or ``base + scaling L R`` of an adapter; differentiable."""
    if form.decomposition == "svd":
        return (tensors["U"], tensors["V"]) if isinstance(form, Factored) else (tensors["lora_B"], tensors["lora_A"])
    prefix = "lora" if isinstance(form, Adapter) else form.decomposition
    into, out = tensors[f"{prefix}_in"], tensors[f"{prefix}_out"]
    if form.decomposition == "tucker":
        return out, torch.einsum("abk,bi->aik", tensors[f"{prefix}_core"].flatten(2), into).flatten(1)
    axes = [tensors[f"{prefix}_{axis}"] for axis in AXES[2] if f"{prefix}_{axis}" in tensors]
    return out, khatri_rao([into, *axes])


def plus_product(W: Tensor, L: Tensor, R: Tensor, scale: float) -> Tensor:
    """``W + scale L R``, of one matrix or of each of a stack."""
    return (torch.addmm if W.ndim == 2 else torch.baddbmm)(W, L, R, alpha=scale)


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """Row-wise Kronecker product of tensors ``(r, n_k)``, ``(r, n_1 n_2 ...)``: the last index runs fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None, :]).flatten(1)
    return product


def merged(form: Form, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The effective ``W (out, in)`` of a layer's stored tensors, in their dtype; differentiable. ``(E, out, in)`` of
    fused experts."""
    match form:
        case Factored():
            L, R = halves(form, tensors)
            return L @ R
        case Adapter():
            L, R = halves(form, tensors)
            return plus_product(layout.matrix(tensors["base"]), L, R, form.scaling)
        case Dense():
            return layout.matrix(tensors["weight"])
    raise TypeError(f"{form!r} is no form that can be merged.")
