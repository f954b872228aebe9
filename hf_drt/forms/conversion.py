"""Conversion: one layer on its way to another form, decided but not yet in force."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_drt.forms.kept import BASE, quantized, widened
from hf_drt.forms.layout import Layout
from hf_drt.forms.modules import AdapterLinear, LowRankLinear, layout_of, working_tensors


@dataclass(frozen=True)
class Merge:
    """A full-size weight that has still to be formed.

    Attributes:
        weight: The Parameter that receives it, in the stored layout; of no elements where the layer had none so far.
        matrix: Gives ``W (out, in)``, in float32 or better.
        source: The layer whose factors go into W, and may be lost to rounding there; None if there are none.
        scale: The Parameter that receives the scales of W's rows, where the weight is one of int8.
    """

    weight: nn.Parameter
    matrix: Callable[[], Tensor]
    source: LowRankLinear | None
    scale: nn.Parameter | None = None

    def run(self, layout: Layout) -> tuple[float, float]:
        """Form the weight, cast it once, and return what the cast has cost (:attr:`Conversion.merge_error`,
        :attr:`Conversion.rounding_error`)."""
        W = self.matrix()
        kept, scale = (W.to(self.weight.dtype), None) if self.scale is None else quantized(W)
        merge_error = rounding_error = 0.0
        if kept.dtype != W.dtype:
            rounded = widened(kept, scale, W.dtype)
            rounding_error = rounding(W, rounded, None)
            if self.source is not None:
                merge_error = rounding(W, rounded, _base(self.source))
        _receive(self.weight, layout.stored(kept))
        if self.scale is not None and scale is not None:
            _receive(self.scale, layout.stored(scale))
        return merge_error, rounding_error


def _base(layer: LowRankLinear) -> Tensor | None:
    """``(out, in)`` of an adapter's base, in float32 or better."""
    return layer.layout.matrix(working_tensors(layer)[BASE]) if isinstance(layer, AdapterLinear) else None


def _receive(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        parameter.data = value.contiguous()


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
        rounding_error: Set by :meth:`commit`: what rounding has cost of the weight that was formed,
            ``||cast(W) - W||_F / ||W||_F``; of an adapter W is its base. 0 in float32, some 0.002 in bfloat16.
    """

    module: nn.Module
    error: float
    merge: Merge | None = None
    trainable: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    merge_error: float = 0.0
    rounding_error: float = 0.0

    def commit(self) -> nn.Module:
        """Form the weight, set what is trainable, let go of the old layer, and return the new one."""
        if self.merge is not None:
            with torch.no_grad():
                self.merge_error, self.rounding_error = self.merge.run(layout_of(self.module))
            self.merge = None
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self.module


def rounding(W: Tensor, rounded: Tensor, base: Tensor | None) -> float:
    """What a cast costs, ``||rounded - W||_F / ||W - base||_F``; base is None where all of W comes from factors."""
    update = (W if base is None else W - base).norm()
    return 0.0 if update == 0 else ((rounded.to(W.dtype) - W).norm() / update).item()
