"""The image recipe and its models, on made-up pictures."""

import fashion_mnist
import numpy as np
import pytest
import torch
import train_image_classifier
from fashion_mnist import FashionMNIST, FashionMNISTError
from image_models import new_image_classifier
from safetensors.torch import load_file
from torch import nn

SMALL = ["--max_steps", "5", "--per_device_train_batch_size", "4", "--warmup_steps", "0", "--disable_tqdm", "true",
         "--max_train_samples", "16", "--max_eval_samples", "8"]  # fmt: skip


@pytest.fixture
def pictures(monkeypatch):
    def made_up(split):
        generator = np.random.default_rng(0)
        return generator.integers(0, 256, (16, 28, 28), np.uint8), generator.integers(0, 10, 16, np.uint8)

    monkeypatch.setattr(fashion_mnist, "fashion_mnist", made_up)


def run(tmp_path, *flags):
    return train_image_classifier.main([*SMALL, "--output_dir", str(tmp_path), *flags])


def test_resnet20_has_the_shape_of_the_paper():
    model = new_image_classifier("resnet20")
    convolutions = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(convolutions) == 19  # and one linear layer
    assert all(m.kernel_size == (3, 3) for m in convolutions)
    weights = 9 * 16 + 6 * 9 * 16**2 + 9 * (16 * 32 + 5 * 32**2) + 9 * (32 * 64 + 5 * 64**2)
    assert sum(m.weight.numel() for m in convolutions) == weights
    sizes = []
    for stage in model.resnet.encoder.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert sizes == [(16, 28, 28), (32, 14, 14), (64, 7, 7)]
    std = model.resnet.embedder.embedder.convolution.weight.std().item()
    assert std == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.3)


def test_pictures_are_normalised(pictures):
    images, labels = fashion_mnist.fashion_mnist("train")
    sample = FashionMNIST("train", 3)[2]
    expected = (images[2].astype(np.float64) / 255 - 0.2860) / 0.3530
    assert np.allclose(sample["pixel_values"][0].numpy(), expected, atol=1e-6)
    assert sample["labels"] == labels[2]


def test_vit_goes_through_the_phases_and_is_saved_dense(tmp_path, pictures, capsys):
    trainer = run(tmp_path)
    assert [phase.kind for phase in trainer.drt.plan.phases] == ["factored", "dense", "adapter"]
    assert "eval accuracy" in capsys.readouterr().out
    assert not any("lora" in name or name.endswith((".U", ".V")) for name in load_file(tmp_path / "model.safetensors"))


def test_a_plain_resnet_is_loaded_as_the_recipe_says(tmp_path, pictures, capsys):
    trainer = run(tmp_path, "--model", "resnet20", "--plain", "--optim", "sgd", "--optim_args", "momentum=0.9")
    assert trainer.drt is None
    assert 'new_image_classifier("resnet20")' in capsys.readouterr().out
    model = new_image_classifier("resnet20").eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    trainer.model.eval()
    pixels = torch.randn(2, 1, 28, 28)
    assert torch.allclose(model(pixels).logits, trainer.model(pixels).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "alexnet"], r"must be one of resnet20, resnet18, vit, got 'alexnet'"),
        (["--max_train_samples", "0"], "max_train_samples must be from 1 to 60000, got 0"),
        (["--max_eval_samples", "10001"], "max_eval_samples must be from 1 to 10000, got 10001"),
    ],
)
def test_bad_flags_are_refused(tmp_path, pictures, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags)


def test_missing_and_damaged_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "FOLDER", tmp_path / "no")
    with pytest.raises(FashionMNISTError, match="apt-get install dataset-fashion-mnist"):
        FashionMNIST("train")
    monkeypatch.setattr(fashion_mnist, "FOLDER", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(FashionMNISTError, match=r"cannot be read: .*Install it anew"):
        FashionMNIST("train")
