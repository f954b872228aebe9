"""Fashion-MNIST (Xiao et al. 2017): 70,000 pictures of clothes, 28 x 28, ten classes; from a Debian package."""

import gzip
from pathlib import Path

import numpy as np
import torch

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": 60_000, "t10k": 10_000}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


class FashionMNISTError(RuntimeError):
    """The data are not installed, or not what they should be."""


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 28, 28)`` uint8 and labels ``(n,)`` of the split 'train' (60,000) or 't10k' (10,000).

    Raises:
        FashionMNISTError: The package is not installed, or a file of it is damaged.
    """
    if not FOLDER.is_dir():
        raise FashionMNISTError(f"{FOLDER} is not there. Install it: apt-get install dataset-fashion-mnist")
    try:
        with gzip.open(FOLDER / f"{split}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(FOLDER / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
    except (OSError, EOFError, ValueError) as error:
        raise FashionMNISTError(f"{FOLDER} cannot be read: {error}. Install it anew: dataset-fashion-mnist") from error
    if not len(images) == len(labels) == SIZES[split]:
        raise FashionMNISTError(
            f"{FOLDER} holds {len(images):,} images and {len(labels):,} labels of '{split}', {SIZES[split]:,} are "
            "expected. Install it anew: dataset-fashion-mnist"
        )
    return images, labels


class FashionMNIST(torch.utils.data.Dataset):
    """``pixel_values (1, 28, 28)``, normalised to mean 0 and deviation 1 of the training set, and ``labels``."""

    MEAN, DEVIATION = 0.2860, 0.3530

    def __init__(self, split: str, limit: int | None = None):
        images, labels = fashion_mnist(split)
        self.images, self.labels = torch.from_numpy(images[:limit].copy()), torch.from_numpy(labels[:limit].copy())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = (self.images[index][None].float() / 255 - self.MEAN) / self.DEVIATION
        return {"pixel_values": pixels, "labels": self.labels[index].long()}
