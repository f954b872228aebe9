"""The only place where a share of min(out, in) becomes an integer rank."""

import re

from hf_drt.config import DRTConfig
from hf_drt.forms.specs import Adapter, Dense, Factored, Form


def break_even_rank(out: int, into: int) -> float:
    """``out in / (out + in)``: the rank at which the factors hold as many parameters as W."""
    return out * into / (out + into)


def resolve_rank(shape: tuple[int, int], rank: float, multiple: int) -> int:
    """An absolute rank (int) as it is, a share (float) of min(out, in) rounded to a multiple, at least one of it."""
    if isinstance(rank, int):
        return rank
    return max(multiple, multiple * round(rank * min(shape) / multiple))


def requested_rank(name: str, phase_rank: float | None, config: DRTConfig) -> float:
    """The rank asked for a layer, most specific first: rank_pattern, the phase's own, rank, rank_ratio."""
    for pattern, rank in (config.rank_pattern or {}).items():
        if re.search(pattern, name):
            return rank
    if phase_rank is not None:
        return phase_rank
    return config.rank if config.rank is not None else float(config.rank_ratio)


def resolve_form(kind: str, shape: tuple[int, int], config: DRTConfig, name: str, phase_rank: float | None) -> Form:
    """The form of one layer in one phase.

    Args:
        kind: 'dense', 'factored' or 'adapter'.
        shape: ``(out, in)``.
        config: Source of ranks, alpha and initialisation.
        name: The layer's name in the model, for ``rank_pattern``.
        phase_rank: Rank written into the schedule; None for the configuration's.

    Returns:
        The form; Dense where the rank would reach break-even, out in / (out + in), and low rank save nothing.
    """
    if kind == "dense":
        return Dense()
    rank = resolve_rank(shape, requested_rank(name, phase_rank, config), config.rank_multiple)
    if rank >= break_even_rank(*shape):
        return Dense()
    if kind == "factored":
        return Factored(rank)
    return Adapter(rank, float(config.adapter_alpha), config.adapter_init)
