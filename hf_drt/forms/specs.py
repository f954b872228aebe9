"""Forms: the parametrizations of one linear map ``W (out, in)``. A spec is what a layer should be, not the layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_drt.forms.layout import LayerShape
from hf_drt.registry import PRODUCTS

if TYPE_CHECKING:
    from hf_drt.forms.products.product import Product

DEFAULT_PRODUCT = "svd"  # that of every layer whatever its kind, and what a file means that names none


@dataclass(frozen=True)
class Dense:
    """``W`` itself: out * in trainable parameters, or none where it is frozen.

    Attributes:
        frozen: Whether it is not trained: no gradient, no optimizer state, and two products in place of three.
        dtype: In which a frozen W is kept: 'bfloat16', for 2 bytes a weight; None for its own.
    """

    frozen: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.frozen, bool):
            raise ValueError(f"frozen must be True or False, got {self.frozen!r}.")
        if self.dtype is not None and (not self.frozen or self.dtype != "bfloat16"):
            raise ValueError(f"dtype is of a frozen weight, and 'bfloat16' or None; got {self.dtype!r} of {self}.")

    def __repr__(self) -> str:
        return _text(self)

    def parameters(self, d_out: int, d_in: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights, bias aside."""
        return 0 if self.frozen else d_out * d_in

    def flops(self, d_out: int, d_in: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 out in; 2 out in without that of the
        weight's gradient."""
        return (2 if self.frozen else 3) * d_out * d_in


@dataclass(frozen=True)
class Factored:
    """``W`` as a product of smaller tensors, all of them trained: ``U V`` with ``U (out, rank)`` and ``V (rank, in)``,
    or that of another decomposition (:mod:`hf_drt.forms.products`).

    Attributes:
        rank: Of the product, by its own meaning of it.
        decomposition: Which product; 'svd' is ``U V``.
        rank_in: The second rank of a product that has one, as 'tucker' has.
    """

    adapts: ClassVar[bool] = False
    scaling: ClassVar[float] = 1.0

    rank: int
    decomposition: str = DEFAULT_PRODUCT
    rank_in: int | None = None

    def __post_init__(self) -> None:
        _check_ranks(self)

    def __repr__(self) -> str:
        return _text(self)

    @property
    def product(self) -> "Product":
        """What the decomposition names."""
        return PRODUCTS[self.decomposition]

    def parameters(self, d_out: int, d_in: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights: rank (out + in) for 'svd'."""
        return self.product.parameters(self, LayerShape(d_out, d_in, kernel))

    def flops(self, d_out: int, d_in: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 rank (out + in) for 'svd'."""
        return 3 * self.product.multiply_adds(self, LayerShape(d_out, d_in, kernel, stride))


@dataclass(frozen=True)
class Adapter:
    """``W = base + (alpha / rank) P`` with a frozen ``base (out, in)`` and a product P of smaller tensors that are
    trained: ``lora_B lora_A`` (Hu et al. 2021, Eq. 3), or that of another decomposition, as in :class:`Factored`.

    ``init`` is 'zero' (P = 0, the function is unchanged and base = W), 'principal' (P takes the top singular
    directions of W, or what the decomposition finds, and base the rest; Meng et al. 2024, PiSSA), or 'split': as
    'principal', but from an adapter on the product itself is divided. A smaller rank keeps P's top singular directions,
    and the base takes the others; a larger one takes the base's top directions in addition (Sun et al. 2025, DRIFT,
    whose rank only falls).

    ``dtype`` is that in which the base is kept: 'bfloat16' for 2 bytes a weight, 'int8' for one, with a scale for each
    row of W; None for that of W.
    """

    adapts: ClassVar[bool] = True

    rank: int
    alpha: float = 16.0
    init: Literal["zero", "principal", "split"] = "zero"
    decomposition: str = DEFAULT_PRODUCT
    rank_in: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_ranks(self)
        if self.dtype not in (None, "bfloat16", "int8"):
            raise ValueError(f"dtype is that of the base, and 'bfloat16', 'int8' or None; got {self.dtype!r}.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}.")
        if self.init not in ("zero", "principal", "split"):
            raise ValueError(f"init must be 'zero', 'principal' or 'split', got {self.init!r}.")
        if self.init == "split" and not self.product.two_matrices:
            raise ValueError(
                f"init 'split' divides a product of two matrices, and decomposition '{self.decomposition}' is of other "
                f"tensors. Use '{DEFAULT_PRODUCT}', or init 'principal'."
            )

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def __repr__(self) -> str:
        return _text(self)

    @property
    def product(self) -> "Product":
        """What the decomposition names."""
        return PRODUCTS[self.decomposition]

    def parameters(self, d_out: int, d_in: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights, those of the product: rank (out + in) for 'svd'. The base is frozen."""
        return self.product.parameters(self, LayerShape(d_out, d_in, kernel))

    def flops(self, d_out: int, d_in: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token: 2 out in for the frozen base (no weight gradient) + 3 times the product's."""
        return 2 * d_out * d_in + 3 * self.product.multiply_adds(self, LayerShape(d_out, d_in, kernel, stride))


Form = Dense | Factored | Adapter
"""What a layer can be."""


def begins_anew(form: Form) -> bool:
    """Whether a layer that is in the form already changes where it is asked for again: factors are re-balanced, an
    adapter is merged and renewed. A dense layer stays as it is, and so does an adapter that is only ever split."""
    return not isinstance(form, Dense) and not (isinstance(form, Adapter) and form.init == "split")


def parameters_of(form: Form, shape: tuple[int, int]) -> int:
    """Trainable weights of a layer of this shape, a :class:`hf_drt.forms.LayerShape`, or ``(out, in)`` of a linear
    layer."""
    shape = LayerShape.of(shape)
    return form.parameters(*shape, shape.kernel)


def flops_of(form: Form, shape: tuple[int, int]) -> int:
    """Multiply-adds per token, or per output position of a convolution, forward and backward."""
    shape = LayerShape.of(shape)
    return form.flops(*shape, shape.kernel, shape.stride)


def forward_of(form: Form, shape: tuple[int, int]) -> int:
    """Multiply-adds of the forward product alone, of what :func:`flops_of` counts: out in of a dense weight and of an
    adapter's base, and those of the low-rank product."""
    shape = LayerShape.of(shape)
    whole = 0 if isinstance(form, Factored) else shape.d_out * shape.d_in
    return whole if isinstance(form, Dense) else whole + form.product.multiply_adds(form, shape)


def product_for(decomposition: str, shape: LayerShape) -> "Product":
    """The product that a layer takes under a setting: the one it names where that suits the layer, else the SVD's."""
    product = PRODUCTS.find(decomposition)
    return product if product.suits(shape) else PRODUCTS[DEFAULT_PRODUCT]


def _check_ranks(form: Factored | Adapter) -> None:
    if not _is_rank(form.rank):
        raise ValueError(f"rank must be a whole number of at least 1, got {form.rank!r}.")
    has_two = PRODUCTS.find(form.decomposition).has_rank_in
    if has_two and not _is_rank(form.rank_in):
        raise ValueError(
            f"decomposition '{form.decomposition}' has a second rank, that of the input channels: rank_in must be a "
            f"whole number of at least 1, got {form.rank_in!r}."
        )
    if not has_two and form.rank_in is not None:
        owners = ", ".join(f"'{name}'" for name, product in PRODUCTS.items() if product.has_rank_in)
        raise ValueError(f"rank_in is of {owners} only, got {form.rank_in!r} with '{form.decomposition}'.")


def _text(form: "Form") -> str:
    fields = vars(form).items()
    told = (f"{name}={value!r}" for name, value in fields if (name, value) not in _SELDOM)
    return f"{type(form).__name__}({', '.join(told)})"


_SELDOM = (("decomposition", DEFAULT_PRODUCT), ("rank_in", None), ("frozen", False), ("dtype", None))


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def form_to_dict(form: Form) -> dict[str, Any]:
    """The form as JSON: ``{"form": "factored", "rank": 8}``. What few layers have is there only where it says
    something."""
    fields = {name: value for name, value in vars(form).items() if (name, value) not in _SELDOM}
    return {"form": type(form).__name__.lower(), **fields}


def form_from_dict(data: dict[str, Any]) -> Form:
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
    raise ValueError(
        f"{data!r} describes no form; allowed are dense (frozen), factored (rank) and adapter (rank, alpha, init)."
    )
