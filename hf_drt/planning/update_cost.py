"""What an update of the matrix optimizer costs before the run, from shapes alone."""

from collections.abc import Sequence

from hf_drt.forms import Dense, Form, LayerShape, flops_of
from hf_drt.linalg import POLAR_STEPS


def update_multiply_adds(form: Form, shape: LayerShape) -> int:
    """Multiply-adds of an update of one matrix in its form; element-wise operations are not counted.

    Of a dense W with k = min(out, in), l = max(out, in): ``5 (2 k^2 l + k^3)``, in bfloat16. Of a pair of factors, or
    an adapter, of rank r: ``4 (out + in) r^2 + 36 r^3`` in products. For either factor these are the Gram matrix, the
    momentum whitened, the Gram matrix of that, and the step: four that meet the factor; 17 of r x r matrices in
    Newton-Schulz, and one that whitens its result. To them come ``5/3 r^3`` of two Cholesky decompositions (of
    ``r^3 / 6`` each) and one triangular inverse (``r^3 / 2``) for either factor. See :mod:`hf_drt.optim.pair_rule`.
    """
    d_out, d_in = shape
    if isinstance(form, Dense):
        k, long = min(shape), max(shape)
        return POLAR_STEPS * (2 * k**2 * long + k**3)
    r = form.rank
    # A square in each step; between two steps a product of the maps, and two for the next Gram matrix.
    small = POLAR_STEPS + 3 * (POLAR_STEPS - 1)
    return 4 * (d_out + d_in) * r**2 + 2 * (small + 1) * r**3 + 5 * r**3 // 3


def update_tokens(
    shapes: Sequence[tuple[int, int]], forms: Sequence[Form], copies: Sequence[tuple[int, int]] | None = None
) -> float:
    """How many tokens cost as much in the training of some layers as an update of the matrix optimizer does: with T
    tokens in an update it takes this over T of the layers' training.

    Of one layer: ``5/3 (2 k + k^2 / l)`` if it is dense, 5 d if it is square too; ``4/3 r + 113/9 r^2 / (out + in)`` of
    factors. Convolutions are counted for output positions, not tokens.

    Args:
        shapes, forms, copies: As of :func:`hf_drt.planning.cost.relative_flops`; of E experts all are updated.
    """
    copies = copies if copies is not None else [(1, 1)] * len(shapes)
    each = [(form, LayerShape.of(shape), *copy) for form, shape, copy in zip(forms, shapes, copies, strict=True)]
    updates = sum(count * update_multiply_adds(form, shape) for form, shape, count, _ in each)
    return updates / sum(active * flops_of(form, shape) for form, shape, _, active in each)
