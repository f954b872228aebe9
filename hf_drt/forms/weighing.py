"""Which changes of form leave something of W out that a layer's inputs can weigh."""

from hf_drt.forms.layout import LayerShape
from hf_drt.forms.products import TwoFactors
from hf_drt.forms.specs import Factored, Form


def weighs_inputs(before: Form, after: Form, shape: LayerShape) -> bool:
    """Whether a layer of this shape loses rank on the way from one form to another, by a decomposition that weighs it.

    Not fused experts in training: each has inputs of its own, which no hook on a module sees, and E matrices
    ``(in, in)`` of them would be larger than their weights.
    """
    if not isinstance(after, Factored) or not after.product.weighs_inputs or shape.experts is not None:
        return False
    if isinstance(before, Factored) and isinstance(before.product, TwoFactors):
        return after.rank < before.rank
    return after.rank < min(shape)
