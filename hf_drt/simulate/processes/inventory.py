"""What parameters a model has in the forms that it is in, and which of them an engine moves together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        unit: Number of the group that FSDP2 gathers at once (:func:`units`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    unit: int

    @property
    def numel(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the whole parameter, in the dtype in which it is kept."""
        return self.numel * self.dtype.itemsize

    def padded(self, count: int) -> int:
        """Elements of the whole as FSDP2 sends it: every one of ``count`` shards has as many rows as the first, so that
        a parameter of fewer rows than there are shards takes as much room as one of as many."""
        rows, *rest = self.shape if self.shape else (1,)
        return -(-rows // count) * count * math.prod(rest)

    def shard(self, count: int) -> tuple[int, ...]:
        """Shape of the first shard, which no other exceeds."""
        rows, *rest = self.shape if self.shape else (1,)
        return (-(-rows // count), *rest)

    def flat(self, count: int) -> int:
        """Elements of one of ``count`` equal parts, as DeepSpeed cuts them: without regard to rows."""
        return -(-self.numel // count)


@dataclass(frozen=True)
class Inventory:
    """All parameters of a model.

    Attributes:
        entries: Each parameter once.
        kept: Units that FSDP2 gathers once for a forward pass and its backward pass, not twice.
        buffers: Bytes of what is no parameter.
    """

    entries: tuple[Entry, ...]
    kept: frozenset[int]
    buffers: int

    @property
    def trainable(self) -> tuple[Entry, ...]:
        """Those with gradients."""
        return tuple(entry for entry in self.entries if entry.trainable)

    def by_unit(self) -> dict[int, list[Entry]]:
        """The parameters of every unit."""
        found: dict[int, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.unit, []).append(entry)
        return found


def inventory(model: nn.Module) -> Inventory:
    """Of a model as it is now; weights are not looked at, and may be on the meta device."""
    number, kept = units(model)
    entries = tuple(
        Entry(name, tuple(p.shape), p.dtype, p.requires_grad, number[id(p)]) for name, p in model.named_parameters()
    )
    return Inventory(entries, frozenset(kept), sum(b.numel() * b.element_size() for b in model.buffers()))


def units(model: nn.Module) -> tuple[dict[int, int], set[int]]:
    """The groups in which FSDP2 gathers parameters, as Accelerate 1.15 makes them, by the parameter's id; and those
    that it keeps from the forward pass to the backward pass.

    A unit for every module of a class that the model says not to split, one for the input embedding, and one that is
    kept, of the last norm and the head (and of the embedding where it is the head's weight). What is left is the
    root's, and kept too. (``accelerate.utils.fsdp_utils.fsdp2_prepare_model``, its wrapping by transformer blocks.)
    """
    number: dict[int, int] = {}
    whole = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in whole and module is not model]
    count = 0
    for module in reversed(blocks):  # what is inside first
        count += _take(number, module.parameters(), count)
    embed, head = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    tied = embed is not None and getattr(embed, "weight", None) is getattr(head, "weight", 0)
    if embed is not None and not tied:
        count += _take(number, embed.parameters(), count)
    tail = [module for module in (_last_norm(model), head) if module is not None]
    kept = {count}
    count += _take(number, (p for module in tail for p in module.parameters()), count)
    _take(number, model.parameters(), count)
    return number, kept | {count}


def _take(number: dict[int, int], parameters: Iterator[nn.Parameter], unit: int) -> int:
    """Put into a unit what is in none yet; 1 if that is anything."""
    fresh = {id(p): unit for p in parameters if id(p) not in number}
    number.update(fresh)
    return bool(fresh)


def _last_norm(model: nn.Module) -> nn.Module | None:
    """The last direct child of the base model whose class is called a norm."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    norms = [child for child in base.children() if "Norm" in type(child).__name__] if base is not None else []
    return norms[-1] if norms else None
