"""Structures: what tensors a form is made of, and how they make up ``W (out, in)``. Tensors in, tensors out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_drt.forms.layout import Layout
from hf_drt.forms.specs import Adapter, Dense, Factored, Form

NAMES = ("U", "V", "base", "lora_A", "lora_B")  # of all low-rank forms


def tensor_shapes(form: Form, shape: tuple[int, int], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's stored tensors, bias aside, for a layer of shape ``(out, in)``."""
    out, into = shape
    stored = layout.shape(out, into)
    match form:
        case Factored(rank):
            return {"U": (out, rank), "V": (rank, into)}
        case Adapter(rank):
            return {"base": stored, "lora_A": (rank, into), "lora_B": (out, rank)}
    return {"weight": stored}


def halves(form: Factored | Adapter, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``L (out, r)`` and ``R (r, in)`` with ``W = L R``, or ``base + scaling L R`` of an adapter; differentiable."""
    return (tensors["U"], tensors["V"]) if isinstance(form, Factored) else (tensors["lora_B"], tensors["lora_A"])


def merged(form: Form, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The effective ``W (out, in)`` of a layer's stored tensors, in their dtype; differentiable."""
    match form:
        case Factored():
            L, R = halves(form, tensors)
            return L @ R
        case Adapter():
            L, R = halves(form, tensors)
            return torch.addmm(layout.matrix(tensors["base"]), L, R, alpha=form.scaling)
        case Dense():
            return layout.matrix(tensors["weight"])
    raise TypeError(f"{form!r} is no form that can be merged.")
