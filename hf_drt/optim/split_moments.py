"""Moments through a split of an adapter's product, by the change of basis from its old factors to the new ones.

Of ``base + s L R`` the new factors are ``L' = L B`` and ``R' = C R``, so that their gradients are linear in the old
ones: ``dL' = (s'/s) dL C^T`` and ``dR' = (s'/s) B^T dR``, where dL = s G R^T and dR = s L^T G. No matrix of W's size is
formed, as it would be by way of W (:mod:`hf_drt.optim.moments`), and the moments of a direction that is kept as it is,
second ones included, are what they were, up to rounding.

Where the rank grows, B and C reach new directions as far as they lie in the span of the old factors. Of what lies
outside nothing is known but the average over the old ones: its first moment is zero, its second one that average. So a
new direction does not meet the run's high step count with a second moment of zero, which would make its first updates
too large.
"""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def first_of_split(old: Pair, new: Pair, ratio: float, moments: Pair) -> Pair:
    """First moments of ``(L', R')`` from those of ``(L, R)``.

    Args:
        old: ``L (out, r)`` and ``R (r, in)``; of fused experts with a leading dimension, as all others.
        new: ``L' (out, r')`` and ``R' (r', in)``.
        ratio: s' / s.
        moments: Of the shapes of ``old``.
    """
    (m_L, m_R), (B, C) = moments, _bases(old, new)
    return ratio * m_L @ C.mT, ratio * B.mT @ m_R


def second_of_split(old: Pair, new: Pair, ratio: float, moments: Pair) -> Pair:
    """Second moments, for gradients of the old factors whose entries are independent: by the squares of B and C.

    Outside of the old span L' has ``row_i ||rest_k||^2`` with ``row_i = sum_k v_L[i, k] / ||R||_F^2``, which is exact
    where all entries of a row of G have one variance; R' the same by columns. Arguments as in :func:`first_of_split`.
    """
    (L, R), (v_L, v_R), (B, C) = old, moments, _bases(old, new)
    outside_R = _lengths(new[1]) - _lengths(C @ R)
    outside_L = _lengths(new[0].mT) - _lengths((L @ B).mT)
    rows, columns = v_L.sum(-1) / _square(R), v_R.sum(-2) / _square(L)
    left = v_L @ C.square().mT + rows[..., :, None] * outside_R.clamp_min(0)[..., None, :]
    right = B.square().mT @ v_R + outside_L.clamp_min(0)[..., :, None] * columns[..., None, :]
    return ratio**2 * left, ratio**2 * right


def _bases(old: Pair, new: Pair) -> Pair:
    """``B (r, r')`` and ``C (r', r)``: the new factors in the span of the old ones, by least squares."""
    (L, R), (new_L, new_R) = old, new
    gram_L, gram_R = (torch.linalg.pinv(gram, hermitian=True) for gram in (L.mT @ L, R @ R.mT))
    return gram_L @ (L.mT @ new_L), (new_R @ R.mT) @ gram_R


def _lengths(rows: Tensor) -> Tensor:
    """Squared length of each row."""
    return rows.square().sum(-1)


def _square(factor: Tensor) -> Tensor:
    """``||.||_F^2``, above 0, with a dimension that others are divided by."""
    return factor.square().sum((-2, -1)).clamp_min(torch.finfo(factor.dtype).tiny)[..., None]
