"""What a phase computes in: autocast, by the name of its dtype; and whether this machine is quick at it."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from hf_drt.schedule import Phase

logger = logging.getLogger(__name__)

BITS = {"fp32": 32, "bf16": 16}
_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # x86-64, and Arm


def autocast(dtype: str | None, device: str) -> AbstractContextManager:
    """The context in which forward passes are in a dtype: ``torch.autocast`` for 'bf16', that switched off for 'fp32',
    whatever is around it; nothing for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16")


class Computing:
    """Sees that the update steps of a loop compute in their phases' dtypes: a dtype that a loop passes over in silence
    would have no effect."""

    def __init__(self) -> None:
        self._asked: bool | None = None  # None: no step has begun
        self._warned = False

    def autocast(self, dtype: str | None, device: str) -> AbstractContextManager:
        """:func:`autocast`, which is noted; the first that is slow is warned of."""
        self._asked = True
        if not self._warned and (message := slow_dtype([dtype], device)):
            logger.warning("%s.", message)
            self._warned = True
        return autocast(dtype, device)

    def step_begins(self, step: int, phase: Phase | None, before: int) -> None:
        """A step begins, or is begun again; ``phase`` is that of the step ``before``.

        Raises:
            ValueError: It has a dtype, and nobody has asked for its context in that step.
        """
        if step > before and self._asked is False and phase is not None and phase.dtype is not None:
            raise ValueError(
                f"phase '{phase}' computes in {phase.dtype}, but drt.autocast() was not asked for in update step "
                f"{before}: the model has computed in what it does anyway. Write `with drt.autocast(): loss = "
                "model(**batch).loss`, or leave the dtype out of the schedule."
            )
        if step > before or self._asked is None:
            self._asked = False

    def restart(self) -> None:
        """The next step is the first that is seen."""
        self._asked = None


def has_bf16_products() -> bool:
    """Whether the CPU has instructions for products of bfloat16 matrices."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BF16)


def slow_dtype(dtypes: Iterable[str | None], device: str) -> str | None:
    """What to know of a run with phases of these dtypes on a kind of device, if it will be slow; else None."""
    if device != "cpu" or "bf16" not in dtypes or has_bf16_products():
        return None
    return (
        "bf16 will be slow on this CPU, which has no instructions for products in it (amx_bf16, avx512_bf16): they may "
        "take many times as long as in fp32. Its results are right. Write fp32, or train where there are such "
        "instructions, or a GPU"
    )
