"""Matrices and second moments in float64, the same every time."""

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(n: int, samples: int = 1000, seed: int = 5) -> Tensor:
    """Of inputs whose directions differ by a factor of 30 in size."""
    X = random(samples, n, seed=seed) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    X = X @ torch.linalg.qr(random(n, n, seed=seed + 1)).Q
    return X.mT @ X / samples
