"""A form as it is written in a schedule: its kind, and its rank."""

import re
from decimal import Decimal

from hf_drt.schedule.dtypes import with_dtype


def form_text(kind: str, rank: int | float | str | None, dtype: str | None = None) -> str:
    """``factored``, ``factored:64`` (absolute), ``factored:0.25`` (share) or ``factored:budget``; with a dtype
    ``factored:0.25/bf16``."""
    if rank is None:
        return with_dtype(kind, dtype)
    text = rank if isinstance(rank, str) else f"{Decimal(repr(rank)):f}"  # never with an exponent
    return with_dtype(f"{kind}:{text}", dtype)


def parse_rank(text: str, entry: str) -> int | float | str:
    """Digits are an absolute rank, a number with a decimal point a share; 'budget' is chosen by the budget.

    Raises:
        ValueError: It is none of these; ``entry`` is the phase that it stands in.
    """
    if text == "budget":
        return text
    if re.fullmatch(r"\d+", text) and int(text) >= 1:
        return int(text)
    if re.fullmatch(r"\d*\.\d+|1\.", text) and 0 < float(text) <= 1:
        return float(text)
    raise ValueError(
        f"'{text}' in '{entry}' is not a rank; allowed is a whole number of at least 1 (factored:64), or a share of "
        "min(out, in) in (0, 1] with a decimal point (factored:0.25), or budget."
    )
