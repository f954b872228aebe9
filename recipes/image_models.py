"""Image classifiers from scratch for 28 x 28 pictures: ResNets of transformers with a stem that fits, and a ViT."""

from typing import Any

from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
)

RESNETS: dict[str, dict[str, Any]] = {
    "resnet20": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [3, 3, 3]},
    "resnet18": {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
}
VIT = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3, "patch_size": 4,
}  # fmt: skip
FAMILIES = (*RESNETS, "vit")


def new_image_classifier(family: str, classes: int = 10, channels: int = 1, **changes: Any) -> PreTrainedModel:
    """A new model of a family, one of :data:`FAMILIES`.

    Args:
        family: ``resnet20`` (He et al. 2016, section 4.2: 3 x 3 basic blocks of widths 16, 32, 64), ``resnet18``, or
            ``vit``.
        classes: Labels.
        channels: Of the pictures.
        changes: Entries of the configuration that differ from the family's.

    Raises:
        ValueError: There is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"the family of an image classifier must be one of {', '.join(FAMILIES)}, got {family!r}.")
    common = {"num_channels": channels, "num_labels": classes}
    if family == "vit":
        return AutoModelForImageClassification.from_config(ViTConfig(image_size=28, **common | VIT | changes))
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **common | RESNETS[family] | changes))
    return with_small_stem(model)


def with_small_stem(model: ResNetForImageClassification) -> ResNetForImageClassification:
    """The stem becomes a 3 x 3 convolution with stride 1, and nothing is pooled, as in ResNets for CIFAR.

    ResNetConfig cannot say so: its stem, 7 x 7 with stride 2 and a pooling, would leave 7 x 7 of 28 x 28 pixels. A
    saved model is therefore not built again by ``from_pretrained``; pass its weights to the model made here. Another
    difference to He et al.: shortcuts to a new width are 1 x 1 convolutions, where they pad with zeros.
    """
    stem = model.resnet.embedder
    old = stem.embedder.convolution
    stem.embedder.convolution = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")  # as transformers
    stem.pooler = nn.Identity()
    return model
