"""``avg <- keep avg + (1 - keep) W``, in place: fused over plain tensors, and of products without their W."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_drt.ema.weights import Weight
from hf_drt.forms import AdapterLinear, FormedLinear, FrozenLinear, LowRankLinear

Pair = tuple[Tensor, Tensor]


def blend(pairs: Iterable[tuple[Tensor, Weight]], keep: float) -> None:
    """Move averages towards the weights of now.

    Beside the averages it takes the memory of one layer's factors in float32; of an average on another device, of one
    weight.

    Args:
        pairs: Each average and its weight.
        keep: Share of the average that stays.
    """
    plain: list[Pair] = []
    for average, weight in pairs:
        if isinstance(weight.source, Tensor):
            plain.append((average, weight.source.detach()))
        else:
            _blend_layer(average, weight, weight.source, keep)
    _blend_tensors(plain, keep)


def _blend_layer(average: Tensor, weight: Weight, layer: FormedLinear, keep: float) -> None:
    if average.device != next(layer.parameters()).device:
        average.lerp_(weight.whole().to(average), 1 - keep)
        return
    W, share = layer.layout.matrix(average), 1 - keep
    match layer:
        case AdapterLinear():
            W.mul_(keep).add_(layer.layout.matrix(layer.whole_base().detach()), alpha=share)
            layer.product.accumulate(W, _factors(layer, average), 1.0, share * layer.form.scaling)
        case LowRankLinear():
            layer.product.accumulate(W, _factors(layer, average), keep, share)
        case FrozenLinear():
            average.mul_(keep).add_(layer.kept.detach(), alpha=share)


def _factors(layer: LowRankLinear, average: Tensor) -> list[Tensor]:
    return [tensor.detach().to(average.dtype) for tensor in layer.product_tensors()]


def _blend_tensors(pairs: list[Pair], keep: float) -> None:
    alike: dict[tuple, list[Pair]] = defaultdict(list)
    for average, value in pairs:
        if not (average.is_floating_point() or average.is_complex()):
            average.copy_(value)
        elif (average.dtype, average.device) == (value.dtype, value.device):
            alike[average.dtype, average.device].append((average, value))
        else:
            average.mul_(keep).add_(value.to(average.device), alpha=1 - keep)  # which casts element by element
    for group in alike.values():
        averages, values = map(list, zip(*group, strict=True))
        torch._foreach_lerp_(averages, values, 1 - keep)  # pyright: ignore[reportPrivateImportUsage]
