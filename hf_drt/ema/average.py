"""EMA: an exponential moving average of a model's effective weights, through its changes of form."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.ema.blend import blend
from hf_drt.ema.copying import put_into
from hf_drt.ema.decay import EMADecay
from hf_drt.ema.shown import shown
from hf_drt.ema.weights import Weight, averaged_dtype, weights_of
from hf_drt.engines import engine_of, unwrapped
from hf_drt.linalg import full_precision
from hf_drt.messages import some

logger = logging.getLogger(__name__)


class EMA:
    """An exponential moving average of every trained weight, ``avg <- d avg + (1 - d) W``.

    W is the effective weight of a layer, in whatever form that is: the weight, U V, or base + s B A. So the average
    follows a change of form, which keeps W, and a restart, which gives the same W other factors. It is dense, since a
    mean of products of rank r is of a higher rank: of the size of the dense model in float32 (:attr:`nbytes`).

    Weights that their user has frozen are not averaged; one that is trained later joins at the next update, with its
    value then. Buffers are averaged only if asked.

    Example::

        ema = hf_drt.EMA(model, decay=0.999)
        for step, batch in enumerate(batches):
            drt.begin_step(step, optimizer)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        with ema.averaged():
            evaluate(model)

    Args:
        model: In any mix of forms; DDP's wrapper and the compiler's too.
        decay: The share that stays at each update, or :class:`EMADecay` with all that can be said of it.
        buffers: Whether buffers that are saved are averaged too, those of whole numbers copied. Else the average uses
            the model's own.
        device: Where the average is kept; by default with each weight. On the CPU it takes none of an accelerator's
            memory, and every update sends all weights there.

    Attributes:
        model: Whose average it is, unwrapped.
        decay: By update.
        updates: How many there have been.

    Raises:
        ValueError: The decay is out of range, a process holds a part of the weights only (FSDP, DeepSpeed), or nothing
            is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | EMADecay = 0.999,
        *,
        buffers: bool = False,
        device: torch.device | str | None = None,
    ):
        self.decay = EMADecay.of(decay)
        self.model, self.updates = unwrapped(model), 0
        _refuse_parts(model)
        self._buffers, self._device = buffers, None if device is None else torch.device(device)
        self._averages: dict[str, Tensor] = {}
        self._shown = False
        self._join(self._weights())
        if not self._averages:
            raise ValueError("the model has no trained weight to average. Build EMA once they require a gradient.")

    # ---- averaging

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now; once after every step of the optimizer.

        Raises:
            ValueError: The model is no longer one of these weights.
            RuntimeError: It shows its average.
        """
        self._refuse_shown("update()")
        weights = self._weights()
        self._check(weights)
        self._join(weights)
        self.updates += 1
        keep = self.decay.at(self.updates)
        if keep is not None:
            with full_precision():
                blend(((self._averages[key], weight) for key, weight in weights.items()), keep)

    @property
    def nbytes(self) -> int:
        """Bytes of the average."""
        return sum(average.nbytes for average in self._averages.values())

    # ---- using the average

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """In the block the model is an ordinary dense one with the averaged weights; it is what the block gets.

        ``save_pretrained`` and ``state_dict`` there are those of the averaged model, whose tensors it shares with the
        average: to keep a state dict, copy it. Afterwards, after an exception too, the model has its own layers and
        Parameter objects again, bit for bit, and their gradients. A block in a block changes nothing.

        Raises:
            ValueError: As :meth:`update`.
            RuntimeError: By an optimizer's step in the block, and at its end where layers were replaced in it.
        """
        if self._shown:
            yield self.model
            return
        weights = self._weights()
        self._check(weights)
        self._join(weights)
        self._shown = True
        try:
            with shown(self.model, self._averages, weights):
                yield self.model
        finally:
            self._shown = False

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None, *, truncate: bool = False) -> dict[str, float]:
        """Write the average into the parameters of a model, which stay the objects that they are.

        Args:
            model: One of the same weights, in any form; by default the one that is averaged.
            truncate: Whether layers of low rank may lose what their rank cannot hold: factors are those of the average
                cut to it, and an adapter those of the average minus its base.

        Returns:
            Of every layer of low rank ``||W - avg||_F / ||avg||_F``, by dense name; empty for a dense model.

        Raises:
            ValueError: The model has other weights, or is of low rank and ``truncate`` is False. Nothing has changed.
            RuntimeError: It shows its average.
        """
        self._refuse_shown("copy_to()")
        target = self.model if model is None else unwrapped(model)
        _refuse_parts(target)
        weights = weights_of(target, self._averages, self._buffers)
        self._check(weights)
        return put_into({key: weights[key] for key in self._averages}, self._averages, truncate)

    # ---- going on later

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and the averages by the names of the dense model; the tensors themselves."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, whatever form the model was in then; with the same model, to the same bits.

        Raises:
            ValueError: It is no such state, or of other weights; the message names them. Nothing has changed.
            RuntimeError: The model shows its average.
        """
        self._refuse_shown("load_state_dict()")
        if not isinstance(state, Mapping) or not {"updates", "averages"} <= set(state):
            raise ValueError("the state has no 'updates' and 'averages': it is not from EMA.state_dict().")
        stored: Mapping[str, Tensor] = state["averages"]
        weights = weights_of(self.model, stored, self._buffers)
        if fault := _difference(stored, weights, "the state", "the model"):
            raise ValueError(
                f"the state of an average does not fit the model: {fault} Load that of the same model, made with the "
                "same buffers=."
            )
        self._averages = {key: self._kept(stored[key], weight.source) for key, weight in weights.items()}
        self.updates = int(state["updates"])

    # ---- the weights

    def _weights(self) -> dict[str, Weight]:
        return weights_of(self.model, self._averages, self._buffers)

    def _join(self, weights: Mapping[str, Weight]) -> None:
        """Begin the average of those that have none, at their value of now."""
        for key, weight in weights.items():
            if key not in self._averages:
                with torch.no_grad():
                    self._averages[key] = self._kept(weight.whole(), weight.source)

    def _kept(self, value: Tensor, source: Tensor | nn.Module) -> Tensor:
        """A copy of a value, laid out and placed as its average is."""
        like = source if isinstance(source, Tensor) else next(source.parameters())
        device = like.device if self._device is None else self._device
        return value.to(device, averaged_dtype(value), copy=True).contiguous()

    def _check(self, weights: Mapping[str, Weight]) -> None:
        """
        Raises:
            ValueError: Some that are averaged are gone, or of another shape.
        """
        present = {key: weight for key, weight in weights.items() if key in self._averages}
        if fault := _difference(self._averages, present, "the average", "the model"):
            packed = any(type(module) is nn.MultiheadAttention for module in self.model.modules())
            split = " If its attention was split then, call hf_drt.split_attention(model) first." if packed else ""
            raise ValueError(
                f"the average is of another model: {fault} Build EMA anew on the model that is trained.{split}"
            )

    def _refuse_shown(self, call: str) -> None:
        if self._shown:
            raise RuntimeError(
                f"within `with ema.averaged()` the model shows its average: call {call} after the block."
            )


def _difference(averages: Mapping[str, Tensor], weights: Mapping[str, Weight], one: str, other: str) -> str | None:
    """How two sets of weights differ, or None."""
    for more, less, owner, lacks in ((averages, weights, one, other), (weights, averages, other, one)):
        if missing := [key for key in more if key not in less]:
            return f"{owner} has {some(missing)}, which {lacks} lacks."
    for key, average in averages.items():
        if tuple(average.shape) != weights[key].shape:
            return f"{key} has shape {tuple(average.shape)} in {one}, and {weights[key].shape} in {other}."
    return None


def _refuse_parts(model: nn.Module) -> None:
    if (engine := engine_of(model)).sharded:
        raise ValueError(
            f"EMA averages whole weights, and under {engine.help.partition(',')[0]} a process holds a part of them, or "
            "of their full precision; the product of two factors in shards is no shard of the dense weight. Train with "
            "DDP or in one process, or leave the average out."
        )
