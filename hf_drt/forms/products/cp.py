"""CP: a kernel as a sum of outer products of one vector along each of its axes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_drt.forms.layout import LayerShape
from hf_drt.forms.products.product import Convolution, KernelProduct, LowRank, Shapes, Source
from hf_drt.forms.starts import without_dead_rows
from hf_drt.linalg import cp, cp_limit, equal_norms, khatri_rao


class Cp(KernelProduct):
    """``W[o,i,h,w] = sum_r out[o,r] in[r,i] height[r,h] width[r,w]`` (Lebedev et al. 2015); Conv1d has no height.

    Three convolutions in place of one: 1 x 1 to rank channels, one depthwise kernel, the outer product of the axes'
    factors, and 1 x 1 to the outputs.
    """

    name = "cp"
    help = "of kernels: 1 x 1, depthwise, 1 x 1"
    weights = "r (in + k + k + out)"
    found_by = "alternating least squares"
    roles = ("in", "height", "width", "out")

    def needed(self, adapts: bool) -> tuple[str, ...]:
        first, _, width, last = self.names(adapts)
        return first, width, last

    def shapes(self, form: LowRank, shape: LayerShape) -> Shapes:
        first, *axes, last = self.names(form.adapts) if len(shape.kernel) > 1 else self.needed(form.adapts)
        along = {axis: (form.rank, size) for axis, size in zip(axes, shape.kernel, strict=True)}
        return {first: (form.rank, shape.channels), **along, last: (shape.d_out, form.rank)}

    def multiply_adds(self, form: LowRank, shape: LayerShape) -> int:
        """The first 1 x 1 acts at every input position, of which there are prod(stride) to an output position; the
        axes are multiplied out to one depthwise kernel."""
        channels = shape.channels * math.prod(shape.stride)
        return form.rank * (channels + math.prod(shape.kernel) + shape.d_out)

    def rank_limit(self, shape: LayerShape) -> int:
        return cp_limit((shape.d_out, shape.channels, *shape.kernel))

    def may_be(self, form: LowRank, d_out: int, d_in: int) -> bool:
        return form.rank <= d_in

    def decompose(self, form: LowRank, source: Source) -> tuple[Tensor, ...]:
        own = source.own(form)
        if own is None:
            return cp(source.kernel(), form.rank)
        first, *axes, last = own  # a restart, which least squares would move
        last, *rest = equal_norms([last.mT, first, *axes])
        return *rest, last.mT.contiguous(), last.new_zeros(())

    def start(
        self, form: LowRank, parts: tuple[Tensor, ...], generator: torch.Generator | None, scaling: float
    ) -> Sequence[Tensor]:
        """The output of a component that is zero stays zero, and the rest of it is made random."""
        *rest, last, _ = parts
        return *without_dead_rows(rest, generator), last / scaling

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        *rest, last = tensors
        return last, khatri_rao(rest)

    def convolution(self, x: Tensor, tensors: Sequence[Tensor], layer: Convolution, bias: Tensor | None) -> Tensor:
        first, *axes, last = tensors
        rank = first.shape[0]
        kernel = khatri_rao(axes).reshape(rank, 1, *layer.kernel_size)
        return layer.pointwise(layer.convolve(layer.pointwise(x, first), kernel, groups=rank), last, bias)
