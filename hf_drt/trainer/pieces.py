"""Batches in pieces: smaller forward and backward passes in dense phases, with the gradient of the whole batch.

A loss L of a batch is one of two kinds. With ``num_items_in_batch`` given it is a sum over samples, divided by a number
that is that of the whole update step: ``L = sum_p L_p`` over pieces p. Else it is a mean, over samples or over labels
that are counted: ``L = sum_p w_p L_p / sum_p w_p``, with ``w_p`` how many of them piece p has. Which one it is, the
first batch with two samples tells (:func:`kind_of_loss`); a loss that is neither, as one with negatives from the whole
batch, is refused then.

Processes that share a model's weights out among them (FSDP) gather these together, and so make as many passes as each
other: one with fewer pieces makes its last pass again, by a weight of 0. They see the same two samples for the kind.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer

from hf_drt.trainer.division import counted, divided, samples
from hf_drt.trainer.untouched import untouched

Kind = Literal["sum", "samples", "labels", "shifted labels"]
_OURS = "hf_drt.trainer."
_SFT = "trl.trainer.sft_trainer.SFTTrainer"  # whose loss is known, and which counts what it is called with
_PASS = "Leave dense_accumulation out, or take a smaller batch with more gradient_accumulation_steps."


class Pieces:
    """Divides the batches of a trainer.

    Args:
        trainer: Whose training step it is.
        count: Pieces of a batch.

    Raises:
        ValueError: As :func:`refuse_division`.
    """

    def __init__(self, trainer: Any, count: int):
        refuse_division(trainer, count)
        self._trainer, self.count, self._sharded = trainer, count, bool(trainer.is_fsdp_enabled)
        self._kind: Kind | None = None
        self._weight = 1.0

    @classmethod
    def of(cls, trainer: Any, count: int) -> "Pieces | None":
        """None where batches stay whole."""
        return cls(trainer, count) if count > 1 else None

    def step(self, step: Callable[..., Tensor], model: nn.Module, inputs: Any, items: Any, divides: bool) -> Tensor:
        """The training step of a batch, in pieces where it ``divides``; its loss.

        Raises:
            ValueError: The batch cannot be divided, or its loss is not made up of those of pieces.
        """
        if self._kind is None:
            self._kind = self._found(inputs, items)
        if not divides or self._kind is None:
            return step(model, inputs, items)
        passes = _weighted(self._kind, divided(inputs, self.count)) or [(inputs, 1.0)]
        if self._sharded:
            passes += [(passes[-1][0], 0.0)] * (self._most(len(passes)) - len(passes))
        losses = []
        for index, (piece, weight) in enumerate(passes):
            # Gradients that are not reduced yet are whole, for which a process that shards them has no room.
            reduces = self._sharded or index == len(passes) - 1
            self._weight = weight
            try:
                with contextlib.nullcontext() if reduces else self._trainer.accelerator.no_sync(model):
                    losses.append(step(model, piece, items))
            finally:
                self._weight = 1.0
        return torch.stack(losses).sum()

    def _most(self, passes: int) -> int:
        """The largest number of passes on any process. Collective."""
        own = torch.tensor([passes], device=self._trainer.args.device)
        return int(self._trainer.accelerator.gather(own).max())

    def weighted(self, loss: Any) -> Any:
        """What a piece's ``compute_loss`` gives, the loss by the piece's weight."""
        if self._weight == 1.0:
            return loss
        return (loss[0] * self._weight, *loss[1:]) if isinstance(loss, tuple) else loss * self._weight

    def _found(self, inputs: Any, items: Any) -> Kind | None:
        """The kind of loss; None where a batch of one sample does not tell."""
        if _owner(type(self._trainer), "compute_loss") == _SFT:
            return "sum" if items is not None else "shifted labels"
        divided(inputs, self.count)  # which says what cannot be divided
        return kind_of_loss(self._trainer, inputs, items)


def _weighted(kind: Kind, pieces: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """The pieces that count, each with its weight in the batch; none where the batch is not divided."""
    weights = [_weight(kind, piece) for piece in pieces]
    if len(pieces) < 2 or not sum(weights):
        return []
    total = 1.0 if kind == "sum" else sum(weights)
    return [(piece, weight / total) for piece, weight in zip(pieces, weights, strict=True) if weight]


def _weight(kind: Kind, piece: Mapping[str, Any]) -> float:
    match kind:
        case "sum":
            return 1.0
        case "samples":
            return len(piece["labels"])
    return counted(piece, shifts=kind == "shifted labels")


def kind_of_loss(trainer: Any, inputs: Any, items: Any) -> Kind | None:
    """What the losses of two samples of a batch say: of each alone and of both, without dropout; None where there are
    too few samples or labels to tell.

    Raises:
        ValueError: That of both is neither their sum nor their mean.
    """
    pair, items, agreed = _of_all(trainer, samples(inputs, 0, 2), items)
    if len(pair["labels"]) < 2:
        return None
    pair = trainer._prepare_input(pair)
    with untouched(trainer.model), torch.no_grad(), trainer.compute_loss_context_manager():
        for module in trainer.model.modules():
            module.training = False

        def loss(batch: dict[str, Any]) -> float:
            return agreed(float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)))

        def error(batch: dict[str, Any], kind: Kind) -> float:
            return _error(loss, batch, kind)

        tolerance = _tolerance(trainer)
        if error(pair, "sum") <= tolerance:
            return "sum"
        kinds: dict[Kind, dict[str, Any]] = {"labels" if _are_classes(pair) else "samples": pair}
        if _has_many_labels(pair):
            classes = pair["labels"][pair["labels"] != -100]
            if not classes.numel():
                return None
            uneven = _uneven(pair, classes[0], -1)
            shifted = not loss(samples(_uneven(pair, classes[0], 0), 1, 2)) > 0  # 0, or not a number
            kinds = {"sum": uneven, "shifted labels" if shifted else "labels": uneven, "samples": uneven}
        errors: dict[Kind, float] = {kind: error(batch, kind) for kind, batch in kinds.items()}
    least = min(errors.values())
    if math.isinf(least):
        return None
    if least > tolerance:
        raise ValueError(
            "dense_accumulation: the loss of two samples is neither the sum of their own losses nor a mean of them, so "
            f"that a batch in pieces would have another gradient (it is off by {least:.1%}). {_PASS}"
        )
    return next(kind for kind, share in errors.items() if share == least)


def _of_all(trainer: Any, pair: dict[str, Any], items: Any) -> tuple[dict[str, Any], Any, Callable[[float], float]]:
    """What a loss is computed of, and what to make of its value. Under FSDP both are those of the first process on all:
    how many more losses are computed depends on them."""
    if not trainer.is_fsdp_enabled:
        return pair, items, lambda loss: loss
    pair, items = broadcast_object_list(send_to_device([pair, items], "cpu"))
    items = send_to_device(items, trainer.args.device)
    return pair, items, lambda loss: broadcast_object_list([loss])[0]


def _error(loss: Callable[[dict[str, Any]], float], pair: dict[str, Any], kind: Kind) -> float:
    """By how much the loss of two samples differs from what it is if losses are of this kind; a share of it. Infinite
    where that loss is 0 or no number, as it is without a label."""
    singles = [samples(pair, 0, 1), samples(pair, 1, 2)]
    weights = [_weight(kind, single) for single in singles]
    total = 1.0 if kind == "sum" else sum(weights)
    parts = (weight / total * loss(single) for weight, single in zip(weights, singles, strict=True) if weight)
    whole = loss(pair)
    share = abs(sum(parts) - whole) / abs(whole) if whole else math.inf
    return share if math.isfinite(share) else math.inf


def _are_classes(batch: Mapping[str, Any]) -> bool:
    """Whether labels are classes, of which -100 is none."""
    return not batch["labels"].is_floating_point()


def _has_many_labels(batch: Mapping[str, Any]) -> bool:
    """Whether a sample has classes of its own for each of its parts, which may be left out one by one."""
    return _are_classes(batch) and batch["labels"].ndim > 1 and "shift_labels" not in batch


def _uneven(pair: dict[str, Any], value: Tensor, at: int) -> dict[str, Any]:
    """All labels of the first sample are counted, and one of the second: a mean over labels is another than one over
    samples."""
    labels = torch.full_like(pair["labels"], -100)
    labels[0], labels[1, ..., at] = value, value
    return {**pair, "labels": labels}


def _tolerance(trainer: Any) -> float:
    """Of a loss, relative: what rounding may do."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in trainer.model.parameters())
    casts = trainer.accelerator.mixed_precision != "no" or (trainer.drt is not None and trainer.drt.dtype == "bf16")
    return 1e-4 if exact and not casts else 1e-2


# ---- what is refused


def refuse_division(trainer: Any, count: int) -> None:
    """Raise where the batches of a trainer cannot be divided into so many pieces.

    Raises:
        ValueError: Says what is in the way, and what to do.
    """
    for found in _obstacles(trainer, count):
        raise ValueError(f"dense_accumulation={count} {found}. {_PASS}")


def _obstacles(trainer: Any, count: int) -> Iterator[str]:
    args, model = trainer.args, trainer.model
    if args.per_device_train_batch_size < count:
        yield f"divides a batch into more pieces than it has samples: it has {args.per_device_train_batch_size}"
    for method in ("compute_loss", "training_step"):
        owner = _owner(type(trainer), method)
        if owner not in (_SFT, _name(Trainer)):
            yield (
                f"does not go with the {method} of {owner}, of which it is not known that its loss is one of samples "
                "that have nothing to do with each other"
            )
    if "lomo" in str(args.optim).lower() or type(trainer.optimizer).__module__.startswith("lomo_optim"):
        yield "does not go with LOMO, which updates weights in the backward pass of every piece"
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        yield "does not go with batch normalisation, whose statistics are those of all samples that are passed together"
    if _owner(type(trainer), "compute_loss") == _SFT and _is_padding_free(trainer):
        yield "does not go with padding_free batches, which are one row"
    if _balances_experts(trainer):
        yield "does not go with a loss that balances experts, which is one of all samples together"


def _balances_experts(trainer: Any) -> bool:
    config: Any = getattr(trainer.model, "config", None)
    texts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
    return bool(getattr(trainer, "aux_loss_enabled", False)) or any(
        getattr(text, "output_router_logits", False) for text in texts
    )


def _is_padding_free(trainer: Any) -> bool:
    """Whether TRL's collator puts all samples of a batch into one row."""
    return bool(getattr(trainer.data_collator, "padding_free", False))


def _owner(cls: type, method: str) -> str:
    """The class whose method a trainer has, ours aside."""
    return next(_name(base) for base in cls.__mro__ if method in vars(base) and not base.__module__.startswith(_OURS))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
