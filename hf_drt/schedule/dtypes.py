"""The dtype that a phase computes in, as it is written behind its form: ``factored:0.125/bf16``."""

import re
from typing import Any

DTYPES = ("fp32", "bf16")
"""In which a phase can compute, the most exact first."""
AUTO = "auto"
"""In place of a dtype: the budget decides."""

_REFUSED = {
    "fp16": "gradients in fp16 need a loss scaler, which leaves updates out and would have to be kept, or made anew, "
    "at every switch; bf16 has the range of fp32, and needs none",
    "fp8": "fp8 needs a GPU with such products, and weights with scales in layers of its own (torchao, "
    "TransformerEngine); autocast knows none",
    "int8": "int8 is a type of stored weights, and autocast computes in none; the frozen bases of adapters are kept in "
    "it with frozen_dtype=int8",
}
_ALIASES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float8": "fp8"}
_WRITTEN = re.compile(r"(.*)/([^/]*)", re.DOTALL)
_GROUPS = re.compile(r"\[[^\[\]]*\]")


def split_dtype(form: str, entry: str) -> tuple[str, str | None]:
    """What stands before the ``@`` of a phase, as the forms and the dtype, None where none is written.

    Raises:
        ValueError: It is no dtype, or stands before the end; ``entry`` is the phase.
    """
    plain = _GROUPS.sub("", form)
    if "/" not in plain or "[" in plain:  # a bracket that is not closed is no group
        return form, None
    match = _WRITTEN.fullmatch(form)
    if match is None or "]" in match[2] or "+" in match[2] or "/" in _GROUPS.sub("", match[1]):
        raise ValueError(
            f"'{entry}' has a '/' before its end. A phase has one dtype, for all its layers, written last, e.g. "
            "factored:0.125/bf16@0 or dense[2/8]+frozen[1/8]/bf16@40%."
        )
    return match[1], _dtype(match[2], entry)


def _dtype(text: str, entry: str) -> str:
    if text in (*DTYPES, AUTO):
        return text
    name = _ALIASES.get(text.lower(), text.lower())
    if name in DTYPES:
        raise ValueError(f"'{text}' in '{entry}' is written {name}.")
    if reason := _REFUSED.get(name):
        raise ValueError(f"'{text}' in '{entry}' is not a dtype of a phase: {reason}. Write bf16 or fp32.")
    raise ValueError(
        f"'{text}' in '{entry}' is not a dtype; allowed are {', '.join(DTYPES)}, and {AUTO} where the budget chooses "
        "the rank (lowrank:budget/auto@0)."
    )


def with_dtype(form: str, dtype: str | None) -> str:
    """The form as it is written, with the dtype behind it."""
    return form if dtype is None else f"{form}/{dtype}"


def recasts(before: Any, after: Any) -> bool:
    """Whether a phase differs from the one before it in its dtype alone, so that no layer changes; both resolved, or
    both as written."""
    same = (before.kind, before.rank, before.parts) == (after.kind, after.rank, after.parts)
    decided = all(part.group is None or part.group.decided for part in after.parts)
    return same and decided and type(before.rank) is type(after.rank) and before.dtype != after.dtype
