"""Two models compared: by what they compute on the same inputs, and by the weights that they store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms import Layout
from hf_drt.inspect.checkpoint import StoredLayer
from hf_drt.linalg import effective_rank, singular_values


@dataclass(frozen=True)
class LogitDifference:
    """How two models' logits ``(..., classes)`` differ.

    Attributes:
        largest, mean: Of ``|b - a|``.
        relative: ``||b - a||_F / ||a||_F``.
        divergence: Mean of ``KL(softmax a || softmax b)`` over the positions, in nats.
        agreement: Share of the positions whose largest logit is the same.
        positions: Their number.
    """

    largest: float
    mean: float
    relative: float
    divergence: float
    agreement: float
    positions: int


@dataclass(frozen=True)
class WeightDifference:
    """How a layer's effective weights differ: ``relative`` is ``||W_b - W_a||_F / ||W_a||_F``."""

    a: StoredLayer
    b: StoredLayer
    relative: float
    effective_ranks: tuple[float, float]


@torch.no_grad()
def logit_difference(a: nn.Module, b: nn.Module, inputs: Mapping[str, Tensor]) -> LogitDifference:
    """Run both models in evaluation mode on the same inputs.

    Raises:
        ValueError: Their logits have different shapes, or there are none.
    """
    x, y = (_logits(model, inputs) for model in (a, b))
    if x.shape != y.shape:
        raise ValueError(
            f"the models cannot be compared: their logits have shapes {tuple(x.shape)} and {tuple(y.shape)}. Compare "
            "two checkpoints of one architecture and vocabulary."
        )
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    size = x.norm()
    return LogitDifference(
        largest=(y - x).abs().max().item(),
        mean=(y - x).abs().mean().item(),
        relative=((y - x).norm() / size).item() if size > 0 else 0.0,
        divergence=max(0.0, F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()),
        agreement=(x.argmax(-1) == y.argmax(-1)).double().mean().item(),
        positions=x.shape[:-1].numel(),
    )


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model.eval()(**inputs)
    logits = getattr(output, "logits", None)
    if not torch.is_tensor(logits):
        raise ValueError(f"{type(model).__name__} gives no logits to compare. Name a task whose model has a head.")
    return logits.float()


def common_layers(a: Sequence[StoredLayer], b: Sequence[StoredLayer]) -> list[tuple[StoredLayer, StoredLayer]]:
    """The layers of the same name in both; some architectures publish their weights under other names than they have
    in a training checkpoint."""
    others = {layer.name: layer for layer in b}
    return [(layer, others[layer.name]) for layer in a if layer.name in others]


def weight_differences(
    pairs: Sequence[tuple[StoredLayer, StoredLayer]], tick: Callable[[], None] = lambda: None
) -> Iterator[WeightDifference]:
    """Compare the effective weights of layers, one pair in memory at a time; ``tick`` is called after each.

    Raises:
        ValueError: Two layers of one name have different shapes, or one holds inf or nan.
    """
    for a, b in pairs:
        # A dense layer does not say how it is stored; the same layer in low-rank form does.
        transposed = bool(a.transposed or b.transposed)
        W_a, W_b = (Layout(transposed and layer.transposed is None).matrix(layer.matrix()) for layer in (a, b))
        if W_a.shape != W_b.shape:
            shapes = f"{tuple(W_a.shape)} in one checkpoint and {tuple(W_b.shape)} in the other"
            raise ValueError(f"{a.name} has shape {shapes}: they are of different models.")
        size = W_a.norm()
        relative = ((W_b - W_a).norm() / size).item() if size > 0 else float(W_b.norm() > 0)
        try:
            ranks = effective_rank(singular_values(W_a)), effective_rank(singular_values(W_b))
        except ValueError as error:
            raise ValueError(f"{a.name}: {error}") from None
        yield WeightDifference(a, b, relative, ranks)
        tick()
