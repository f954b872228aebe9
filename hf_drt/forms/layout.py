"""How a dense layer stores its weight, and how that is seen as a matrix ``W (out, in)``."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor, nn

CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Layout:
    """The way from a stored weight to ``W (out, in)`` and back.

    Attributes:
        transposed: Stored as ``(in, out)``, as transformers' ``Conv1D`` (GPT-2) does.
        kernel: Of a convolution, e.g. (3, 3): stored as ``(out, channels, *kernel)``, with in = channels * kernel size.
            Empty for a linear layer.
        count: Of fused experts, E: a leading dimension of the stored weight and of W; None for a layer of one matrix.
    """

    transposed: bool = False
    kernel: tuple[int, ...] = ()
    count: int | None = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimension of every tensor: ``(E,)``, or none."""
        return batch_shape(self.count)

    def matrix(self, stored: Tensor) -> Tensor:
        """``W (out, in)``, or ``(E, out, in)`` of fused experts, a view."""
        if self.kernel:
            return stored.flatten(1)
        return stored.mT if self.transposed else stored

    def stored(self, matrix: Tensor) -> Tensor:
        """The weight as the dense layer stores it, a view."""
        if self.kernel:
            return matrix.reshape(self.shape(*matrix.shape))
        return matrix.mT if self.transposed else matrix

    def shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        """Shape of the stored weight. With ``d_out = 0`` that of an entry of no elements."""
        if self.kernel:
            return (d_out, d_in // prod(self.kernel), *self.kernel)
        return *self.batch_shape, *((d_in, d_out) if self.transposed else (d_out, d_in))


class LayerShape(tuple[int, int]):
    """``(out, in)`` of a layer's W, and what else its forms and their cost depend on.

    It compares, unpacks, prints and is written to files as the pair that it is; :meth:`matches` compares all of it.

    Attributes:
        kernel: Of a convolution, the size along each axis; in = channels * prod(kernel). Empty for other layers.
        stride: Of a convolution, along each axis; empty for other layers.
        experts: Of fused experts, how many matrices of this shape there are; None for a layer of one.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    experts: int | None

    def __new__(
        cls,
        d_out: int,
        d_in: int,
        kernel: Iterable[int] = (),
        stride: Iterable[int] = (),
        experts: int | None = None,
    ) -> "LayerShape":
        shape = super().__new__(cls, (d_out, d_in))
        shape.kernel, shape.stride, shape.experts = tuple(kernel), tuple(stride), experts
        return shape

    @classmethod
    def of(cls, shape: tuple[int, int]) -> "LayerShape":
        """The shape itself, or that of a linear layer where it is a mere pair."""
        return shape if isinstance(shape, cls) else cls(*shape)

    def __getnewargs__(self) -> tuple:
        return *self, self.kernel, self.stride, self.experts

    @property
    def d_out(self) -> int:
        """Rows of W: output features, or output channels."""
        return self[0]

    @property
    def d_in(self) -> int:
        """Columns of W: input features, or input channels times the kernel's size."""
        return self[1]

    @property
    def channels(self) -> int:
        """Input channels of a convolution; input features of another layer."""
        return self.d_in // prod(self.kernel)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimension of every tensor: ``(E,)``, or none."""
        return batch_shape(self.experts)

    @property
    def has_kernel(self) -> bool:
        """Whether it is a convolution whose kernel has more than one element, and so is more than a matrix."""
        return any(size > 1 for size in self.kernel)

    def matches(self, other: "LayerShape") -> bool:
        """Whether a layer of the other shape is one of this: the same matrix, kernel and number of matrices."""
        return self == other and self.kernel == other.kernel and self.experts == other.experts


def batch_shape(count: int | None) -> tuple[int, ...]:
    """The leading dimension of the tensors of E experts, and of a layer of one matrix (None)."""
    return () if count is None else (count,)


def is_transposed(dense: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), whose weight is stored as ``(in, out)``."""
    return _derives_from_conv1d(type(dense))


@cache
def _derives_from_conv1d(kind: type) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" == CONV1D for cls in kind.__mro__)


def dense_layout(dense: nn.Module) -> Layout:
    """The layout of a dense layer: the one it tells of, as fused experts do, or that of its class."""
    if isinstance(own := getattr(dense, "layout", None), Layout):
        return own
    if isinstance(dense, (nn.Conv1d, nn.Conv2d)):
        return Layout(kernel=tuple(dense.kernel_size))
    return Layout(transposed=is_transposed(dense))
