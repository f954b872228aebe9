"""Image classifiers from scratch on Fashion-MNIST."""

from pathlib import Path
from typing import Any

from fashion_mnist import FashionMNIST
from image_models import new_image_classifier
from task import Task


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def image_classifier(model: dict[str, Any], data: dict[str, Any], cache: Path) -> Task:
    """A ViT, or the ``family`` of the section ``model``, on Fashion-MNIST."""
    family = model.pop("family", "vit")
    return Task(
        lambda: new_image_classifier(family, **model),
        FashionMNIST("train", data["train_images"]),
        FashionMNIST("t10k", data["eval_images"]),
        metrics=accuracy,
    )
