"""Optimizer moments across a change of form, by the first-order chain rule.

With ``W = const + s L R`` (``L (out, r)``, ``R (r, in)``, s = 1 for factors and alpha / r for an adapter) the gradients
are ``dL/dL = s G R^T`` and ``dL/dR = s L^T G``, where G = dL/dW. A first moment is a moving average of gradients, and
follows the same linear maps. A second moment is the average of squared gradients; its image is exact for entries of G
that are independent of each other (``v_L = s^2 v_W (R*R)^T``), which is the assumption Adam makes anyway.

An adapter that is split goes by its factors alone (:mod:`hf_drt.optim.split_moments`).

A kernel is the matrix that its layout makes of it. Products of more tensors than two, or others, start with moments
anew (:attr:`hf_drt.forms.Product.two_matrices`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.forms import AdapterLinear, Dense, LowRankLinear, form_of, layout_of, trainable_weights
from hf_drt.linalg import LinAlgError, working_dtype
from hf_drt.optim.rule import MomentKeys, State
from hf_drt.optim.split_moments import first_of_split, second_of_split


def project(old: nn.Module, new: nn.Module, states: list[State], keys: MomentKeys) -> list[State]:
    """State of the new layer's trainable weights from that of the old one's, both in ``trainable_weights`` order.

    Entries that are no moments (the step count) are taken over as they are, but for those of the old weight's shape.
    Moments that are kept in codes stay behind. Where a moment's image is zero
    everywhere, as for lora_A while lora_B = 0, the state is left empty: a zero second moment next to a high step count
    would make the first updates too large.
    """
    try:
        return _project(old, new, states, keys)
    except LinAlgError:
        # Moments start anew where the factors are too ill-conditioned to solve for them.
        return [{} for _ in trainable_weights(new)]


def _project(old: nn.Module, new: nn.Module, states: list[State], keys: MomentKeys) -> list[State]:
    forms = (form_of(module) for module in (old, new))
    by_matrix = all(isinstance(form, Dense) or form.product.two_matrices for form in forms)
    if not by_matrix or not all(states) or not (keys.first or keys.second) or _coded(states, keys):
        return [{} for _ in trainable_weights(new)]
    new_parts, shape = trainable_weights(new), trainable_weights(old)[0].shape
    others = {k: v for k, v in states[0].items() if not _is_moment(k, keys) and not _is_like(v, shape)}
    images: list[State] = [{k: _copy(v) for k, v in others.items()} for _ in new_parts]
    for key in (*keys.first, *keys.second):
        moments = [moment for state in states if (moment := state.get(key)) is not None]
        if len(moments) < len(states):
            continue
        second = key in keys.second
        parts = _carried(old, new, [m.to(working_dtype(m.dtype)) for m in moments], second)
        for image, like, part in zip(images, new_parts, parts, strict=True):
            image[key] = part.to(dtype=moments[0].dtype, device=like.device).contiguous()
    for image in images:
        _bound_second(image, keys)
    return [image if _has_moments(image, keys) else {} for image in images]


def _carried(old: nn.Module, new: nn.Module, moments: list[Tensor], second: bool) -> list[Tensor]:
    """One kind of moment of the new weights; of several in one entry, as a fast and a slow average, each by itself."""
    if moments[0].ndim == trainable_weights(old)[0].ndim:
        return _split(old, new, moments, second) or _lower(new, _lift(old, moments, second), second)
    each = (_carried(old, new, list(own), second) for own in zip(*moments, strict=True))
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _split(old: nn.Module, new: nn.Module, moments: list[Tensor], second: bool) -> list[Tensor] | None:
    """Moments of an adapter that came out of another one by a split; None where it did not."""
    if not (isinstance(old, AdapterLinear) and isinstance(new, AdapterLinear) and new.is_split):
        return None
    (L, R, s), (new_L, new_R, new_s) = _factors(old), _factors(new)
    image = second_of_split if second else first_of_split
    return list(_by_factor(new, image((L, R), (new_L, new_R), new_s / s, _by_factor(old, tuple(moments)))))


def _bound_second(image: State, keys: MomentKeys) -> None:
    """``v >= m^2``, as holds for averages of one sequence: gradients whose entries are correlated have larger squares
    than independent ones, and a v that is too small makes the first updates too large."""
    for first in keys.first:
        for second in keys.second:
            if first in image and second in image:
                squares = image[first].square().reshape(-1, *image[second].shape)  # of several averages
                image[second] = torch.maximum(image[second], squares.amax(0))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _coded(states: list[State], keys: MomentKeys) -> bool:
    """Whether a moment is kept in codes, as in 8 bits, and is no number that could be mapped."""
    held = (v for state in states for key, v in state.items() if _is_moment(key, keys) and isinstance(v, Tensor))
    return not all(v.is_floating_point() for v in held)


def _is_like(value: Any, shape: torch.Size) -> bool:
    """Whether an entry belongs to the numbers of a weight of this shape one by one."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == shape


def _is_moment(key: str, keys: MomentKeys) -> bool:
    return key in keys.first or key in keys.second


def _has_moments(state: State, keys: MomentKeys) -> bool:
    return all(bool(state[key].any()) for key in state if _is_moment(key, keys)) and any(
        _is_moment(key, keys) for key in state
    )


def _lift(module: nn.Module, moments: list[Tensor], second: bool) -> Tensor:
    """The moment of W ``(out, in)`` behind those of the layer's trainable weights."""
    if not isinstance(module, LowRankLinear):
        return layout_of(module).matrix(moments[0])
    L, R, scale = _factors(module)
    m_L, m_R = _by_factor(module, moments)
    return _second_from_factors(L, R, scale, m_L, m_R) if second else _first_from_factors(L, R, scale, m_L, m_R)


def _lower(module: nn.Module, moment: Tensor, second: bool) -> list[Tensor]:
    """Moments of the layer's trainable weights from the moment of W ``(out, in)``."""
    if not isinstance(module, LowRankLinear):
        return [layout_of(module).stored(moment)]
    L, R, scale = _factors(module)
    if second:
        parts = scale**2 * moment @ (R * R).mT, scale**2 * (L * L).mT @ moment
    else:
        parts = scale * moment @ R.mT, scale * L.mT @ moment
    return list(_by_factor(module, parts))


def _factors(module: LowRankLinear) -> tuple[Tensor, Tensor, float]:
    L, R, scale = module.pair()
    dtype = working_dtype(L.dtype)
    return L.detach().to(dtype), R.detach().to(dtype), scale


def _by_factor(module: LowRankLinear, pair: Any) -> Any:
    """Exchange between ``(L, R)`` order and ``trainable_weights`` order; the map is its own inverse."""
    left_first = trainable_weights(module)[0] is module.pair()[0]
    return pair if left_first else pair[::-1]


def _first_from_factors(L: Tensor, R: Tensor, scale: float, m_L: Tensor, m_R: Tensor) -> Tensor:
    """Least-norm M with ``s M R^T = m_L`` and ``s L^T M = m_R``; where the two disagree, as they do a little after the
    factors have moved, their common part is averaged."""
    left_inverse, right_inverse = (torch.linalg.pinv(gram, hermitian=True) for gram in (L.mT @ L, R @ R.mT))
    by_rows = m_L @ right_inverse @ R / scale
    by_columns = L @ left_inverse @ m_R / scale
    common = L @ (left_inverse @ (L.mT @ by_rows)) + ((by_columns @ R.mT) @ right_inverse) @ R
    return by_rows + by_columns - common / 2


def _second_from_factors(L: Tensor, R: Tensor, scale: float, v_L: Tensor, v_R: Tensor) -> Tensor:
    """Rank-one estimate ``v_W[i, j] = row_i col_j / mean`` (as in Adafactor, Shazeer and Stern 2018) from the row sums
    of v_L and the column sums of v_R, which are averages of v_W weighted with R*R and L*L."""
    if L.ndim == 3:  # of fused experts
        experts = zip(L, R, v_L, v_R, strict=True)
        return torch.stack([_second_from_factors(*own[:2], scale, *own[2:]) for own in experts])
    row, col = _mean_over(v_L.sum(1), scale * R), _mean_over(v_R.sum(0), scale * L)
    if row.any() and col.any():
        return row[:, None] * col[None] / (row.mean() * col.mean()).sqrt()
    return row[:, None] + col[None]


def _mean_over(total: Tensor, factor: Tensor) -> Tensor:
    weight = factor.square().sum()
    return total / weight if weight > 0 else torch.zeros_like(total)
