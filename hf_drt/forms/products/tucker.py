"""Tucker-2: a kernel of low rank along its output and its input channels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_drt.forms.layout import LayerShape
from hf_drt.forms.products.product import Convolution, KernelProduct, LowRank, Shapes, Source
from hf_drt.linalg import tucker2


class Tucker(KernelProduct):
    """``W[o,i,h,w] = sum_ab out[o,a] core[a,b,h,w] in[b,i]`` with a < rank, b < rank_in (Tucker-2, Kim et al. 2016).

    Three convolutions in place of one: 1 x 1 to rank_in channels, the core with its kernel, 1 x 1 to the outputs.
    """

    name = "tucker"
    help = "of kernels: 1 x 1, k x k core, 1 x 1"
    weights = "in r_in + r_in r k k + r out"
    found_by = "higher-order orthogonal iteration"
    roles = ("in", "core", "out")
    has_rank_in = True

    def shapes(self, form: LowRank, shape: LayerShape) -> Shapes:
        assert form.rank_in is not None
        sizes = (form.rank_in, shape.channels), (form.rank, form.rank_in, *shape.kernel), (shape.d_out, form.rank)
        return dict(zip(self.names(form.adapts), sizes, strict=True))

    def multiply_adds(self, form: LowRank, shape: LayerShape) -> int:
        """The first 1 x 1 acts at every input position, of which there are prod(stride) to an output position."""
        before, core, after = map(math.prod, self.shapes(form, shape).values())
        return before * math.prod(shape.stride) + core + after

    def rank_limit(self, shape: LayerShape) -> int:
        return shape.d_out

    def may_be(self, form: LowRank, d_out: int, d_in: int) -> bool:
        return form.rank <= d_out and form.rank_in is not None and form.rank_in <= d_in

    def break_even(self, shape: LayerShape) -> float:
        """With ratio = channels / out and rank_in = ratio r: ratio k r^2 + (out + ratio channels) r = out in."""
        (d_out, d_in), channels = shape, shape.channels
        size, ratio = d_in // channels, channels / d_out
        linear, square = d_out + ratio * channels, ratio * size
        return (math.sqrt(linear**2 + 4 * square * d_out * d_in) - linear) / (2 * square)

    def decompose(self, form: LowRank, source: Source) -> tuple[Tensor, ...]:
        assert form.rank_in is not None
        return tucker2(source.kernel(), form.rank, form.rank_in)

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        before, core, after = tensors
        return after, torch.einsum("abk,bi->aik", core.flatten(2), before).flatten(1)

    def convolution(self, x: Tensor, tensors: Sequence[Tensor], layer: Convolution, bias: Tensor | None) -> Tensor:
        before, core, after = tensors
        return layer.pointwise(layer.convolve(layer.pointwise(x, before), core), after, bias)
