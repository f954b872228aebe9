"""The two sides of a product: a trainable weight of ``W = const + s L R`` is the left factor L or the right one R."""

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import LowRankLinear, trainable_weights

LEFT, RIGHT = "left", "right"
# None: both sides, or a weight that is on neither, as a dense one or one of a product of other tensors than two.
Side = str | None


def sides(module: nn.Module) -> tuple[Side, ...]:
    """The side of each of a layer's trainable weights, in their order."""
    weights = trainable_weights(module)
    if not isinstance(module, LowRankLinear) or not module.product.two_matrices:
        return (None,) * len(weights)
    L, _, _ = module.pair()
    return tuple(LEFT if weight is L else RIGHT for weight in weights)


def side_scales(config: DRTConfig) -> dict[Side, float]:
    """LR multipliers by side; one for both where they are equal."""
    left, right = config.left_lr_scale, config.right_lr_scale
    return {None: left} if left == right else {LEFT: left, RIGHT: right}
