"""Product: how a low-rank form makes up ``W (out, in)`` of smaller tensors, and all that depends on it.

A new one is a class in a file of its own, an object of which is added to the registry
(:data:`hf_drt.registry.PRODUCTS`); nothing else has to know of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_drt.forms.layout import LayerShape, Layout
from hf_drt.forms.specs import Adapter, Factored, Form
from hf_drt.forms.starts import random_tensor
from hf_drt.registry import PRODUCTS

LowRank = Factored | Adapter
Shapes = dict[str, tuple[int, ...]]


class Convolution(Protocol):
    """A layer that convolves: its own stride, padding and dilation, with whatever kernel."""

    kernel_size: tuple[int, ...]
    in_channels: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """With the layer's stride, padding and dilation."""
        ...

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """1 x 1, with ``matrix (out, in)``."""
        ...


@dataclass(frozen=True)
class Source:
    """A layer that is to be decomposed.

    Attributes:
        form: The form that it is in.
        shape: Of its W.
        layout: How its dense weight is stored.
        matrix: Gives the effective ``W (out, in)``, in float32 or better.
        tensors: Gives its stored tensors by name, in float32 or better.
        covariance: Second moments ``E[x x^T] (in, in)`` of its inputs, or any multiple of them, by which a product that
            can (:attr:`Product.weighs_inputs`) weighs what it leaves out of W; None to weigh nothing.
    """

    form: Form
    shape: LayerShape
    layout: Layout
    matrix: Callable[[], Tensor]
    tensors: Callable[[], Mapping[str, Tensor]]
    covariance: Tensor | None = None

    def kernel(self) -> Tensor:
        """The weight as the dense layer stores it: ``(out, channels, *kernel)`` of a convolution."""
        return self.layout.stored(self.matrix())

    def own(self, form: LowRank) -> list[Tensor] | None:
        """Its tensors, as they come in :class:`Product`, where it is in exactly this factored form; else None."""
        if isinstance(self.form, Factored) and self.form == form:
            return self.form.product.ordered(self.form, self.tensors())
        return None

    @property
    def narrow(self) -> Factored | None:
        """Its form, where it is factored into two matrices with just its rank between them (:class:`TwoFactors`)."""
        if isinstance(self.form, Factored) and isinstance(self.form.product, TwoFactors):
            return self.form
        return None

    def split_by(self, form: LowRank) -> Adapter | None:
        """Its form, where it is an adapter of two matrices that another one splits."""
        now = self.form
        if isinstance(form, Adapter) and form.init == "split" and isinstance(now, Adapter) and now.product.two_matrices:
            return now
        return None

    def factors(self, form: LowRank) -> tuple[Tensor, Tensor]:
        """``L (out, r)`` and ``R (r, in)`` with ``W = L R``, of a layer in this form."""
        return form.product.factors(form.product.ordered(form, self.tensors()))


class Product(ABC):
    """What a low-rank form is made of, and what is done with it.

    Its tensors come in the order in which an input meets them. Those of a layer are Parameters of the layer's module;
    which names they have, :meth:`names` tells. Some may be those of another product too, as lora_in and lora_out of the
    adapters of Tucker and CP. But each product has one that no other has, and a layer refuses to load a name that is
    not its own, but another product's: so weights of one form never load into another.

    Attributes:
        name: As the setting ``decomposition`` calls it.
        help: What it is, in half a sentence, for help texts.
        weights, found_by: How many weights it has, and what finds them, for the documentation.
        roles: Of its tensors, in order; their names are made of them. The last one is set to zero where an adapter
            begins with a product of zero.
        fits_only: Which layers it is for, as in "none of the 14 layers is ...", where that is not all linear layers
            and convolutions.
        has_rank_in: Whether it has a second rank, that of the input channels.
        two_matrices: Whether its tensors are two matrices L and R with ``W = L R``, as of an SVD: then optimizer
            moments map by the chain rule, there is a decay of the product, and its adapter is a LoRA of PEFT.
        weighs_inputs: Whether the decomposition for a factored form weighs by :attr:`Source.covariance`.
    """

    name: str
    help: str
    weights: str
    found_by: str
    roles: tuple[str, ...]
    fits_only: str = "a linear layer or a convolution"
    has_rank_in: bool = False
    two_matrices: bool = False
    weighs_inputs: bool = False

    def __deepcopy__(self, memo: Any) -> "Product":
        return self  # it has no state

    def __reduce__(self) -> Any:
        return _registered, (self.name,)

    # ---- for which layers

    def refusal(self, shape: LayerShape) -> str | None:
        """Why no layer of this shape can have the product, as in "decomposition 'x' is ...", or None."""
        return "not for fused experts" if shape.experts is not None else None

    def suits(self, shape: LayerShape) -> bool:
        """Whether the setting gives it to such a layer, which takes the SVD's otherwise."""
        return self.refusal(shape) is None

    # ---- its tensors

    def names(self, adapts: bool) -> tuple[str, ...]:
        """Names of its tensors in an adapter or in a factored form, in order; also of those that only some layers
        have."""
        prefix = f"lora_{self.name}" if adapts else self.name
        return tuple(f"{prefix}_{role}" for role in self.roles)

    def needed(self, adapts: bool) -> tuple[str, ...]:
        """Names of the tensors that every layer has."""
        return self.names(adapts)

    @abstractmethod
    def shapes(self, form: LowRank, shape: LayerShape) -> Shapes:
        """Names and shapes of a layer's tensors, of one matrix, as its module registers them."""

    def ordered(self, form: LowRank, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """A layer's tensors in order."""
        return [tensors[name] for name in self.names(form.adapts) if name in tensors]

    # ---- its size and cost

    def parameters(self, form: LowRank, shape: LayerShape) -> int:
        """Weights of one matrix."""
        return sum(prod(size) for size in self.shapes(form, shape).values())

    def multiply_adds(self, form: LowRank, shape: LayerShape) -> int:
        """Of the forward product for one token, or one output position of a convolution: its weights, each once."""
        return self.parameters(form, shape)

    @abstractmethod
    def rank_limit(self, shape: LayerShape) -> int:
        """The largest rank, from which on every W is met exactly."""

    def rank_in_limit(self, shape: LayerShape) -> int:
        """The largest second rank, of a product that has one."""
        return shape.channels

    def may_be(self, form: LowRank, d_out: int, d_in: int) -> bool:
        """Whether there is a layer of this size that has such a form, whatever its kernel."""
        return form.rank <= self.rank_limit(LayerShape(d_out, d_in))

    def break_even(self, shape: LayerShape) -> float:
        """The rank at which it holds as many weights as W; they grow as the rank does, unless overridden."""
        return shape.d_out * shape.d_in / self.parameters(Factored(1, self.name), shape)

    # ---- where its values come from

    @abstractmethod
    def decompose(self, form: LowRank, source: Source) -> tuple[Tensor, ...]:
        """What :meth:`start` needs of a layer's W: by default the tensors in order. Last comes the relative Frobenius
        error, of no dimension. All in float32 or better."""

    def parts(self, form: LowRank, source: Source) -> tuple[tuple[int, ...], ...]:
        """Shapes of what :meth:`decompose` gives: known beforehand, so that another process can send it."""
        sizes = self.shapes(form, source.shape)
        return *(sizes[name] for name in self.names(form.adapts) if name in sizes), ()

    def start(
        self, form: LowRank, parts: tuple[Tensor, ...], generator: torch.Generator | None, scaling: float
    ) -> Sequence[Tensor]:
        """The tensors in order, of a product of 1 / scaling times what was decomposed.

        Args:
            generator: Of random directions where there would be dead ones.
            scaling: alpha / rank of an adapter, 1 in factored form.
        """
        *rest, last, _ = parts
        return *rest, last / scaling

    def start_at_zero(self, form: LowRank, shape: LayerShape, generator: torch.Generator | None) -> Sequence[Tensor]:
        """The tensors in order, of a product of zero that can learn: all random but the last."""
        sizes = self.shapes(form, shape)
        *rest, last = (sizes[name] for name in self.names(form.adapts) if name in sizes)
        random = (random_tensor(shape.batch_shape, size, generator) for size in rest)
        return *random, torch.zeros(*shape.batch_shape, *last)

    # ---- what it computes; every method is differentiable

    @abstractmethod
    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """``W (out, in)``."""

    def added(self, W: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
        """``W + scale P``."""
        return torch.add(W, self.matrix(tensors), alpha=scale)

    def accumulate(self, W: Tensor, tensors: Sequence[Tensor], keep: float, scale: float) -> None:
        """``W <- keep W + scale P``, in place; of tensors of one dtype."""
        W.mul_(keep).add_(self.matrix(tensors), alpha=scale)

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``L (out, k)`` and ``R (k, in)`` with ``W = L R``: W and the identity, where there are none with a smaller
        k."""
        W = self.matrix(tensors)
        return W, torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)

    def linear(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """``y = W x + b`` of a linear layer."""
        return F.linear(x, self.matrix(tensors), bias)

    def added_linear(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
        """``y + scale P x``."""
        return torch.add(y, self.linear(x, tensors), alpha=scale)

    def convolution(self, x: Tensor, tensors: Sequence[Tensor], layer: Convolution, bias: Tensor | None) -> Tensor:
        """``y = W * x + b`` of a convolution."""
        kernel = self.matrix(tensors).unflatten(1, (layer.in_channels, *layer.kernel_size))
        return layer.convolve(x, kernel, bias)


class TwoFactors(Product):
    """A product that is one of two matrices with just its rank between them: ``W = L R``, ``L (out, r)``."""

    @abstractmethod
    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``L (out, r)`` and ``R (r, in)``."""

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        L, R = self.factors(tensors)
        return L @ R

    def added(self, W: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
        L, R = self.factors(tensors)
        return (torch.addmm if W.ndim == 2 else torch.baddbmm)(W, L, R, alpha=scale)

    def accumulate(self, W: Tensor, tensors: Sequence[Tensor], keep: float, scale: float) -> None:
        L, R = self.factors(tensors)  # P is never formed
        (W.addmm_ if W.ndim == 2 else W.baddbmm_)(L, R, beta=keep, alpha=scale)


class KernelProduct(TwoFactors):
    """A product that says something of convolutions alone: of a kernel ``(out, channels, *kernel)`` as a tensor."""

    fits_only = "one with a kernel"

    def names(self, adapts: bool) -> tuple[str, ...]:
        return tuple(f"{'lora' if adapts else self.name}_{role}" for role in self.roles)

    def refusal(self, shape: LayerShape) -> str | None:
        if not shape.kernel:
            return f"of convolutions only, and the layer is linear, of shape (out, in) = {shape}"
        return super().refusal(shape)

    def suits(self, shape: LayerShape) -> bool:
        """Not 1 x 1 convolutions, which are nothing but matrices."""
        return shape.has_kernel and super().suits(shape)


def _registered(name: str) -> Product:
    return PRODUCTS[name]
