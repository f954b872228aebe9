"""How a dense layer stores its weight, and how that is seen as a matrix ``W (out, in)``."""

from dataclasses import dataclass
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
    def lead(self) -> tuple[int, ...]:
        """The leading dimension of every tensor: ``(E,)``, or none."""
        return () if self.count is None else (self.count,)

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

    def shape(self, out: int, into: int) -> tuple[int, ...]:
        """Shape of the stored weight. With ``out = 0`` that of an entry of no elements."""
        if self.kernel:
            return (out, into // prod(self.kernel), *self.kernel)
        return *self.lead, *((into, out) if self.transposed else (out, into))


class ConvShape(tuple[int, int]):
    """``(out, in)`` of a convolution's kernel seen as a matrix, and what else its cost depends on.

    Attributes:
        kernel: Size along each axis; in = channels * prod(kernel).
        stride: Along each axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    def __new__(cls, out: int, into: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> "ConvShape":
        shape = super().__new__(cls, (out, into))
        shape.kernel, shape.stride = tuple(kernel), tuple(stride)
        return shape

    def __getnewargs__(self) -> tuple:
        return *self, self.kernel, self.stride

    @property
    def channels(self) -> int:
        """Input channels."""
        return self[1] // prod(self.kernel)


def is_transposed(dense: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), whose weight is stored as ``(in, out)``."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == CONV1D for cls in type(dense).__mro__)


def dense_layout(dense: nn.Module) -> Layout:
    """The layout of a dense layer: the one it tells of, as fused experts do, or that of its class."""
    if isinstance(own := getattr(dense, "layout", None), Layout):
        return own
    if isinstance(dense, (nn.Conv1d, nn.Conv2d)):
        return Layout(kernel=tuple(dense.kernel_size))
    return Layout(transposed=is_transposed(dense))
