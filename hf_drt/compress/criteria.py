"""The criteria of a compression: which form each layer takes by a rank, a share, an energy or a budget."""

import math
from collections.abc import Callable

from hf_drt.compress.allocation import Curve, allocate
from hf_drt.compress.layers import TargetLayer, stored
from hf_drt.forms import Dense, Form
from hf_drt.planning import resolve_rank

ALLOCATIONS = ("harm", "error", "uniform")


def criterion_of(**given: float | None) -> tuple[str, float]:
    """The one criterion that is set, and its value.

    Raises:
        ValueError: None or several are set, or the value is outside its interval.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}; got {' and '.join(chosen) or 'none'}.")
    ((name, value),) = chosen.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "energy" and not (number and 0 < value <= 1):
        raise ValueError(f"energy must be in (0, 1], got {value!r}. It is the share of ||W||_F^2 that a layer keeps.")
    if name == "parameters" and not (number and (value >= 1 if isinstance(value, int) else 0 < value < 1)):
        raise ValueError(
            f"parameters must be a share of the dense layers' in (0, 1), with a decimal point, or a whole number of at "
            f"least 1, got {value!r}."
        )
    return name, value


def forms_for(layers: list[TargetLayer], name: str, value: float, multiple: int, allocation: str | None) -> list[Form]:
    """What a criterion makes of the layers; a budget by one of :data:`ALLOCATIONS`.

    Raises:
        ValueError: The budget is smaller than the least that the layers can hold.
    """
    if name == "energy":
        return [layer.at(_energy_rank(layer, value, multiple)) for layer in layers]
    if name == "parameters":
        return _by_budget(layers, value, multiple, allocation or "error")
    rank = value if name == "rank" else float(value)
    return [layer.at(resolve_rank(layer.shape, rank, multiple)) for layer in layers]


def _energy_rank(layer: TargetLayer, share: float, multiple: int) -> int:
    """The smallest rank, a multiple, that keeps this share of ``||W||_F^2``."""
    kept = (layer.values.double() ** 2).cumsum(0)
    enough = int((kept < share * kept[-1]).sum()) + 1
    return multiple * math.ceil(enough / multiple)


def least_of(layers: list[TargetLayer], multiple: int) -> int:
    """Parameters of the layers at the least rank."""
    return sum(stored(layer.options(multiple)[0], layer.shape) for layer in layers)


def _by_budget(layers: list[TargetLayer], value: float, multiple: int, allocation: str) -> list[Form]:
    dense = sum(stored(Dense(), layer.shape) for layer in layers)
    budget = value if isinstance(value, int) else int(value * dense)
    least = least_of(layers, multiple)
    if budget < least:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small: at rank {multiple}, the least that rank_multiple allows, "
            f"the {len(layers)} layers hold {least:,} ({least / dense:.3f} of dense). Raise parameters, or lower "
            "rank_multiple."
        )
    if allocation == "uniform":
        return _uniform_share(layers, budget, multiple)
    if allocation == "harm":
        return _filled(layers, budget, multiple, TargetLayer.harm)
    ways = (_filled(layers, budget, multiple, _squared_error), _uniform_ratio(layers, budget, multiple))
    return min(ways, key=lambda forms: sum(map(_squared_error, layers, forms)))


def _squared_error(layer: TargetLayer, form: Form) -> float:
    return layer.error(form) ** 2


def _filled(
    layers: list[TargetLayer], budget: int, multiple: int, loss: Callable[[TargetLayer, Form], float]
) -> list[Form]:
    """The budget spent where it saves the most of a loss that adds up over the layers."""
    options = [layer.options(multiple) for layer in layers]
    curves: list[Curve] = [
        [(stored(form, layer.shape), loss(layer, form)) for form in forms]
        for layer, forms in zip(layers, options, strict=True)
    ]
    return [forms[index] for forms, index in zip(options, allocate(curves, budget), strict=True)]


def _uniform_share(layers: list[TargetLayer], budget: int, multiple: int) -> list[Form]:
    """The same share of each layer's ``out in`` weights, up to the ranks' rounding: the largest within the budget."""

    def forms(share: float) -> list[Form]:
        # Of the rank at which factors hold as much as W.
        full = [layer.shape.d_out * layer.shape.d_in / sum(layer.shape) for layer in layers]
        ranks = [max(multiple, multiple * round(share * each / multiple)) for each in full]
        return [layer.at(rank) for layer, rank in zip(layers, ranks, strict=True)]

    full = {layer.shape.d_out * layer.shape.d_in / sum(layer.shape) for layer in layers}
    return _largest(forms, {(j + 0.5) * multiple / each for each in full for j in range(int(each) // multiple + 1)},
                    layers, budget)  # fmt: skip


def _uniform_ratio(layers: list[TargetLayer], budget: int, multiple: int) -> list[Form]:
    """The forms of the largest rank_ratio within the budget."""
    widths = {min(layer.shape) for layer in layers}

    def forms(ratio: float) -> list[Form]:
        return [layer.at(resolve_rank(layer.shape, ratio, multiple)) for layer in layers]

    return _largest(forms, {(j + 0.5) * multiple / width for width in widths for j in range(width // multiple + 1)},
                    layers, budget)  # fmt: skip


def _largest(
    forms: Callable[[float], list[Form]], steps: set[float], layers: list[TargetLayer], budget: int
) -> list[Form]:
    """The forms of the largest share within the budget, found among the shares where a rank changes."""
    shares = sorted(steps)

    def cost(share: float) -> int:
        return sum(stored(form, layer.shape) for layer, form in zip(layers, forms(share), strict=True))

    low, high = 0, len(shares)  # shares[:low] fit, shares[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(shares[middle] * (1 + 1e-9)) <= budget else (low, middle)
    return forms(shares[low - 1] * (1 + 1e-9) if low else 1e-9)
