"""Forms: the parametrizations of one linear map ``W (out, in)``. A spec is what a layer should be, not the layer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dense:
    """``W`` itself: out * in trainable parameters."""

    def parameters(self, out: int, into: int) -> int:
        """Trainable weights, bias aside."""
        return out * into

    def flops(self, out: int, into: int) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 out in."""
        return 3 * out * into


@dataclass(frozen=True)
class Factored:
    """``W = U V`` with ``U (out, rank)`` and ``V (rank, in)``."""

    rank: int

    def __post_init__(self) -> None:
        _check_rank(self)

    def parameters(self, out: int, into: int) -> int:
        """Trainable weights: rank (out + in)."""
        return self.rank * (out + into)

    def flops(self, out: int, into: int) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 rank (out + in)."""
        return 3 * self.rank * (out + into)


@dataclass(frozen=True)
class Adapter:
    """``W = base + (alpha / rank) lora_B lora_A`` with a frozen ``base (out, in)`` (Hu et al. 2021, Eq. 3).

    ``init`` is 'zero' (lora_B = 0, the function is unchanged and base = W) or 'principal' (the adapter takes the top
    singular directions of W and base the rest; Meng et al. 2024, PiSSA).
    """

    rank: int
    alpha: float = 16.0
    init: Literal["zero", "principal"] = "zero"

    def __post_init__(self) -> None:
        _check_rank(self)
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}.")
        if self.init not in ("zero", "principal"):
            raise ValueError(f"init must be 'zero' or 'principal', got {self.init!r}.")

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def parameters(self, out: int, into: int) -> int:
        """Trainable weights: rank (out + in); the base is frozen."""
        return self.rank * (out + into)

    def flops(self, out: int, into: int) -> int:
        """Multiply-adds per token: 2 out in for the frozen base (no weight gradient) + 3 rank (out + in)."""
        return 2 * out * into + 3 * self.rank * (out + into)


Form = Dense | Factored | Adapter


def _check_rank(form: Factored | Adapter) -> None:
    if not isinstance(form.rank, int) or isinstance(form.rank, bool) or form.rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {form.rank!r}.")


def form_to_dict(form: Form) -> dict:
    """The form as JSON: ``{"form": "factored", "rank": 8}``."""
    return {"form": type(form).__name__.lower(), **vars(form)}


def form_from_dict(data: dict) -> Form:
    """Inverse of :func:`form_to_dict`.

    Raises:
        ValueError: No such form, or not its fields.
    """
    fields = dict(data)
    name = fields.pop("form", None)
    for cls in (Dense, Factored, Adapter):
        if cls.__name__.lower() == name and set(fields) <= set(cls.__dataclass_fields__):
            try:
                return cls(**fields)
            except (TypeError, ValueError):
                break
    raise ValueError(f"{data!r} describes no form; allowed are dense, factored (rank) and adapter (rank, alpha, init).")
