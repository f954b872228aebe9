"""How a dense layer stores its weight, and how that is seen as a matrix ``W (out, in)``."""

from dataclasses import dataclass

from torch import Tensor, nn

CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Layout:
    """The way from a stored weight to ``W (out, in)`` and back.

    Attributes:
        transposed: Stored as ``(in, out)``, as transformers' ``Conv1D`` (GPT-2) does.
    """

    transposed: bool = False

    def matrix(self, stored: Tensor) -> Tensor:
        """``W (out, in)``, a view."""
        return stored.mT if self.transposed else stored

    def stored(self, matrix: Tensor) -> Tensor:
        """The weight as the dense layer stores it, a view."""
        return matrix.mT if self.transposed else matrix

    def shape(self, out: int, into: int) -> tuple[int, ...]:
        """Shape of the stored weight. With ``out = 0`` or ``into = 0`` that of an entry of no elements."""
        return (into, out) if self.transposed else (out, into)


def is_transposed(dense: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), whose weight is stored as ``(in, out)``."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == CONV1D for cls in type(dense).__mro__)


def dense_layout(dense: nn.Module) -> Layout:
    """The layout of a dense layer."""
    return Layout(transposed=is_transposed(dense))
