"""Conversion: one layer on its way to another form, decided but not yet in force."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_drt.forms.layout import Layout
from hf_drt.forms.modules import AdapterLinear, LowRankLinear, layout_of


@dataclass(frozen=True)
class Merge:
    """A full-size weight that has still to be formed.

    Attributes:
        weight: The Parameter that receives it, in the stored layout; of no elements where the layer had none so far.
        matrix: Gives ``W (out, in)``, in float32 or better.
        source: The layer whose factors go into W, and may be lost to rounding there; None if there are none.
    """

    weight: nn.Parameter
    matrix: Callable[[], Tensor]
    source: LowRankLinear | None

    def run(self, layout: Layout) -> float:
        """Form the weight, cast it once, and return what the cast has cost (:attr:`Conversion.merge_error`)."""
        W = self.matrix()
        stored = layout.stored(W.to(self.weight.dtype))
        error = 0.0
        if self.source is not None:
            base = self.source.base.detach() if isinstance(self.source, AdapterLinear) else None
            error = rounding(W, layout.matrix(stored), None if base is None else layout.matrix(base))
        if self.weight.shape == stored.shape:
            self.weight.copy_(stored)
        else:
            self.weight.data = stored.contiguous()
        return error


@dataclass
class Conversion:
    """A layer in its new form, not yet in force.

    Everything of low rank is in it already, and all checks are made; a weight of full size is formed by
    :meth:`commit`, so that the conversions of a whole model need no second copy of it.

    Attributes:
        module: The layer in its new form. It may hold Parameter objects of the old layer (bias; W between dense and
            adapter form), whose values and ``requires_grad`` are set by :meth:`commit`.
        error: Relative Frobenius error of the effective weight by truncation, ``||W_new - W_old||_F / ||W_old||_F``.
        merge: The weight that has to be formed, if any.
        merge_error: Set by :meth:`commit`: what rounding to the parameter's dtype has cost where factors are merged
            into W, relative to what they add to it, ``||cast(W) - W||_F / ||W - base||_F``, with base = 0 for Factored.
            0 in float32; 1 where an adapter's update is lost in half precision.
    """

    module: nn.Module
    error: float
    merge: Merge | None = None
    trainable: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    merge_error: float = 0.0

    def commit(self) -> nn.Module:
        """Form the weight, set what is trainable, let go of the old layer, and return the new one."""
        if self.merge is not None:
            with torch.no_grad():
                self.merge_error = self.merge.run(layout_of(self.module))
            self.merge = None
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self.module


def rounding(W: Tensor, rounded: Tensor, base: Tensor | None) -> float:
    """What a cast costs, ``||rounded - W||_F / ||W - base||_F``; base is None where all of W comes from factors."""
    if rounded.dtype == W.dtype:
        return 0.0
    update = (W if base is None else W - base).norm()
    return 0.0 if update == 0 else ((rounded.to(W.dtype) - W).norm() / update).item()
