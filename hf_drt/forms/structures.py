"""Structures: what tensors a form is made of, and how they make up ``W (out, in)``. Tensors in, tensors out."""

from collections.abc import Mapping

from torch import Tensor

from hf_drt.forms.kept import BASE, SCALE
from hf_drt.forms.layout import LayerShape, Layout
from hf_drt.forms.specs import Adapter, Dense, Factored, Form


def tensor_shapes(form: Form, shape: tuple[int, int], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's stored tensors, bias aside, for a layer of shape ``(out, in)``."""
    stored = layout.shape(*shape)
    if isinstance(form, Dense):
        return {"weight": stored}
    shape = LayerShape(*shape, layout.kernel)
    product = {name: (*layout.batch_shape, *size) for name, size in form.product.shapes(form, shape).items()}
    if isinstance(form, Factored):
        return product
    frozen = {BASE: stored, SCALE: layout.shape(shape.d_out, 1)}
    return {name: frozen[name] for name in frozen_names(form)} | product


def frozen_names(form: Form) -> tuple[str, ...]:
    """Names of the tensors of a low-rank form that are not trained: of an adapter."""
    if not isinstance(form, Adapter):
        return ()
    return (BASE, SCALE) if form.dtype == "int8" else (BASE,)


def factors(form: Factored | Adapter, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``L (out, r)`` and ``R (r, in)`` with ``W = L R``, or ``base + scaling L R`` of an adapter; differentiable."""
    return form.product.factors(form.product.ordered(form, tensors))


def merged(form: Form, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The effective ``W (out, in)`` of a layer's stored tensors, in their dtype; differentiable. ``(E, out, in)`` of
    fused experts."""
    match form:
        case Factored():
            return form.product.matrix(form.product.ordered(form, tensors))
        case Adapter():
            parts = form.product.ordered(form, tensors)
            return form.product.added(layout.matrix(tensors[BASE]), parts, form.scaling)
        case Dense():
            return layout.matrix(tensors["weight"])
    raise TypeError(f"{form!r} is not a form that can be merged.")
