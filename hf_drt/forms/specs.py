"""Forms: the parametrizations of one linear map ``W (out, in)``. A spec is what a layer should be, not the layer."""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

Decomposition = Literal["svd", "tucker", "cp"]


@dataclass(frozen=True)
class Dense:
    """``W`` itself: out * in trainable parameters."""

    def parameters(self, out: int, into: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights, bias aside."""
        return out * into

    def flops(self, out: int, into: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 out in."""
        return 3 * out * into


@dataclass(frozen=True)
class Factored:
    """``W = U V`` with ``U (out, rank)`` and ``V (rank, in)``; of a convolution (in = channels * kernel size) also

    - 'tucker': ``W[o,i,h,w] = sum_ab out[o,a] core[a,b,h,w] in[b,i]`` with a < rank, b < rank_in (Tucker-2, Kim et al.
      2016),
    - 'cp': ``W[o,i,h,w] = sum_r out[o,r] in[r,i] height[r,h] width[r,w]`` (Lebedev et al. 2015); Conv1d has no height.
    """

    rank: int
    decomposition: Decomposition = "svd"
    rank_in: int | None = None

    def __post_init__(self) -> None:
        _check_ranks(self)

    def __repr__(self) -> str:
        return _text(self)

    def parameters(self, out: int, into: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights: rank (out + in), or those of :func:`low_rank_parameters`."""
        return low_rank_parameters(self, out, into, kernel)

    def flops(self, out: int, into: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token of the forward and both backward products: 3 rank (out + in) for 'svd'."""
        return 3 * low_rank_products(self, out, into, kernel, stride)


@dataclass(frozen=True)
class Adapter:
    """``W = base + (alpha / rank) lora_B lora_A`` with a frozen ``base (out, in)`` (Hu et al. 2021, Eq. 3); of a
    convolution also with the products of :class:`Factored` that 'tucker' and 'cp' are.

    ``init`` is 'zero' (lora_B = 0, the function is unchanged and base = W) or 'principal' (the adapter takes the top
    singular directions of W, or what the decomposition finds, and base the rest; Meng et al. 2024, PiSSA).
    """

    rank: int
    alpha: float = 16.0
    init: Literal["zero", "principal"] = "zero"
    decomposition: Decomposition = "svd"
    rank_in: int | None = None

    def __post_init__(self) -> None:
        _check_ranks(self)
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}.")
        if self.init not in ("zero", "principal"):
            raise ValueError(f"init must be 'zero' or 'principal', got {self.init!r}.")

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def __repr__(self) -> str:
        return _text(self)

    def parameters(self, out: int, into: int, kernel: tuple[int, ...] = ()) -> int:
        """Trainable weights: rank (out + in), or those of :func:`low_rank_parameters`; the base is frozen."""
        return low_rank_parameters(self, out, into, kernel)

    def flops(self, out: int, into: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> int:
        """Multiply-adds per token: 2 out in for the frozen base (no weight gradient) + 3 times the low-rank ones."""
        return 2 * out * into + 3 * low_rank_products(self, out, into, kernel, stride)


Form = Dense | Factored | Adapter


def low_rank_parameters(form: Factored | Adapter, out: int, into: int, kernel: tuple[int, ...] = ()) -> int:
    """Weights of the product: ``r (out + in)`` for 'svd', ``r_in channels + r r_in k + r out`` for 'tucker' and
    ``r (channels + kh + kw + out)`` for 'cp', with k = kh kw and in = channels k."""
    size = prod(kernel)
    channels = into // size
    match form.decomposition:
        case "tucker":
            return form.rank_in * channels + form.rank * form.rank_in * size + form.rank * out
        case "cp":
            return form.rank * (channels + sum(kernel) + out)
    return form.rank * (out + into)


def low_rank_products(
    form: Factored | Adapter, out: int, into: int, kernel: tuple[int, ...] = (), stride: tuple[int, ...] = ()
) -> int:
    """Multiply-adds of the product for one output position (a token): its weights, each once, but

    - what acts on the channels before a strided kernel ('tucker', 'cp') does so at every input position, of which there
      are prod(stride) to an output position,
    - the axes of 'cp' are multiplied out to one depthwise kernel of kh kw weights.
    """
    size, positions = prod(kernel), prod(stride)
    channels = into // size
    match form.decomposition:
        case "tucker":
            return form.rank_in * channels * positions + form.rank * form.rank_in * size + form.rank * out
        case "cp":
            return form.rank * (channels * positions + size + out)
    return form.rank * (out + into)


def parameters_of(form: Form, shape: tuple[int, int]) -> int:
    """Trainable weights of a layer of shape ``(out, in)``, a :class:`hf_drt.forms.ConvShape` of a convolution."""
    return form.parameters(*shape, getattr(shape, "kernel", ()))


def flops_of(form: Form, shape: tuple[int, int]) -> int:
    """Multiply-adds per token, or per output position of a convolution, forward and backward."""
    return form.flops(*shape, getattr(shape, "kernel", ()), getattr(shape, "stride", ()))


def _check_ranks(form: Factored | Adapter) -> None:
    if not _is_rank(form.rank):
        raise ValueError(f"rank must be a whole number of at least 1, got {form.rank!r}.")
    if form.decomposition not in get_args(Decomposition):
        allowed = ", ".join(get_args(Decomposition))
        raise ValueError(f"decomposition must be one of {allowed}, got {form.decomposition!r}.")
    if form.decomposition == "tucker" and not _is_rank(form.rank_in):
        raise ValueError(
            "decomposition 'tucker' has a second rank, that of the input channels: rank_in must be a whole number of "
            f"at least 1, got {form.rank_in!r}."
        )
    if form.decomposition != "tucker" and form.rank_in is not None:
        raise ValueError(f"rank_in is of 'tucker' only, got {form.rank_in!r} with '{form.decomposition}'.")


def _text(form: Factored | Adapter) -> str:
    fields = vars(form).items()
    told = (f"{name}={value!r}" for name, value in fields if (name, value) not in _SELDOM)
    return f"{type(form).__name__}({', '.join(told)})"


_SELDOM = (("decomposition", "svd"), ("rank_in", None))  # what linear layers never have otherwise


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def form_to_dict(form: Form) -> dict:
    """The form as JSON: ``{"form": "factored", "rank": 8}``. Fields of convolutions only where they say something."""
    fields = dict(vars(form))
    if fields.get("decomposition") == "svd":
        del fields["decomposition"]
    if fields.get("rank_in", 0) is None:
        del fields["rank_in"]
    return {"form": type(form).__name__.lower(), **fields}


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
