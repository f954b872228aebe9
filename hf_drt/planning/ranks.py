"""The only place where a share of min(out, in) becomes an integer rank."""

import math
import re

from hf_drt.config import DRTConfig
from hf_drt.forms import Adapter, Dense, Factored, Form, LayerShape, Product, parameters_of, product_for, rank_limit

# Leaves such as q_proj, k_lin, query, key_proj, wq, to_k, q_a_proj; none that holds values too, as kv_proj or qkv.
_QUERY_OR_KEY = re.compile(
    r"(?:to_|linear_|w)?(?:q|k|query|key)(?:_(?:proj|lin|linear|layer|[ab]_proj))?", re.IGNORECASE
)


def is_query_or_key(name: str) -> bool:
    """Whether a layer's name is that of a query or key projection, inside something named after attention."""
    owner, _, leaf = name.rpartition(".")
    return "att" in owner.lower() and _QUERY_OR_KEY.fullmatch(leaf) is not None


def break_even_rank(d_out: int, d_in: int) -> float:
    """``out in / (out + in)``: the rank at which the factors hold as many parameters as W."""
    return d_out * d_in / (d_out + d_in)


def break_even_of(shape: LayerShape, decomposition: str) -> float:
    """The rank at which a layer's product holds as many parameters as W, in the decomposition that it would take."""
    return product_for(decomposition, shape).break_even(shape)


def resolve_rank(shape: LayerShape, rank: float, multiple: int) -> int:
    """An absolute rank (int) as it is, a share (float) of min(out, in) rounded to a multiple, at least one of it.

    Of a convolution the share is one of its output channels.
    """
    if isinstance(rank, int):
        return rank
    whole = shape.d_out if shape.kernel else min(shape)
    return max(multiple, multiple * round(rank * whole / multiple))


def resolve_rank_in(shape: LayerShape, rank: float, multiple: int) -> int:
    """The second rank, of the input channels: the same share of them, in 1..channels; of an absolute rank the share
    that it is of the output channels, unrounded."""
    if isinstance(rank, int):
        return min(shape.channels, max(1, round(shape.channels * rank / shape.d_out)))
    return min(shape.channels, max(multiple, multiple * round(rank * shape.channels / multiple)))


def stays_dense(kind: str, name: str, config: DRTConfig) -> bool:
    """Whether the configuration keeps a layer dense in phases of a kind, whatever its rank (``dense_query_key``)."""
    named = any(re.search(pattern, name) for pattern in config.patterns)
    return kind == "factored" and config.keeps_query_key and is_query_or_key(name) and not named


def requested_rank(name: str, phase_rank: float | None, config: DRTConfig) -> float:
    """The rank asked for a layer, most specific first: rank_pattern, the phase's own, rank, rank_ratio."""
    for pattern, rank in config.patterns.items():
        if re.search(pattern, name):
            return rank
    if phase_rank is not None:
        return phase_rank
    return config.rank if config.rank is not None else float(config.rank_ratio)


def resolve_form(kind: str, shape: LayerShape, config: DRTConfig, name: str, phase_rank: float | None) -> Form:
    """The form of one layer in one phase.

    Args:
        kind: 'dense', 'frozen', 'factored' or 'adapter'.
        shape: Of its W.
        config: Source of ranks, alpha and initialisation.
        name: The layer's name in the model, for ``rank_pattern``.
        phase_rank: Rank written into the schedule; None for the configuration's.

    Returns:
        The form; Dense where the rank would reach break-even, out in / (out + in) or that of the decomposition
        (:func:`break_even_of`), and low rank save nothing, and for query and key projections in factored phases, where
        the configuration keeps those.

    Raises:
        ValueError: Adapters are to be split, and the layer's decomposition is of other tensors than two matrices; or
            the layer is to be frozen whole in int8.
    """
    kept = None if shape.kernel or shape.experts else config.frozen_dtype
    if kind == "frozen":
        if kept == "int8":
            raise ValueError(
                "frozen_dtype=int8 is for the bases of adapters, and the schedule freezes layers whole: those are "
                "trained again, and would lose at each time what 8 bits do not hold; and their files load where those "
                "of dense layers do. Take frozen_dtype=bfloat16."
            )
        return Dense(frozen=True, dtype=kept)
    if kind == "dense" or stays_dense(kind, name, config):
        return Dense()
    requested = requested_rank(name, phase_rank, config)
    rank = resolve_rank(shape, requested, config.rank_multiple)
    product = product_for(config.decomposition, shape)
    rank_in = resolve_rank_in(shape, requested, config.rank_multiple) if product.has_rank_in else None
    factored = Factored(rank, product.name, rank_in)
    if parameters_of(factored, shape) >= math.prod(shape) or rank > rank_limit(factored, shape):
        return Dense()
    if kind == "factored":
        return factored
    _check_split(product, config)
    return Adapter(rank, config.alpha_of(rank), config.init, product.name, rank_in, kept)


def _check_split(product: Product, config: DRTConfig) -> None:
    if config.init != "split" or product.two_matrices:
        return
    preset = f" (by the preset {config.preset.name})" if config.preset and "adapter_init" in config.brought else ""
    raise ValueError(
        f"adapter_init='split'{preset} divides a product U V, and decomposition='{product.name}' is of other tensors. "
        "Use decomposition='svd', or adapter_init='principal', by which an adapter begins anew at each change."
    )
