"""Sums of x x^T of a layer's inputs, against what they make of its outputs: sum y y^T = W (sum x x^T) W^T."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_drt.covariance import add_moments, empty_moments
from hf_drt.covariance import moments as module
from hf_drt.forms import Adapter, Factored, convert, layout_of

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 11, 3), (3, 9)),
    "1d, stride, padding": (nn.Conv1d(3, 11, 3, stride=2, padding=2), (3, 9)),
    "1 x 1": (nn.Conv2d(5, 6, 1), (5, 4, 4)),
    "2d": (nn.Conv2d(2, 20, (3, 2)), (2, 6, 7)),
    "stride, padding, dilation": (nn.Conv2d(2, 20, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 6, 7)),
    "same": (nn.Conv2d(2, 20, (3, 2), padding="same"), (2, 6, 7)),
    "reflect": (nn.Conv2d(2, 20, 3, padding=1, padding_mode="reflect"), (2, 6, 7)),
    "circular": (nn.Conv1d(3, 11, 3, padding=1, padding_mode="circular"), (3, 9)),
}


def assert_moments(layer: nn.Module, x: torch.Tensor, W: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """W (m, n) with m >= n, so that what it makes of C determines C; columns (m, count) of outputs without the bias."""
    total = empty_moments(layer, x.device)
    for half in x.split(2):
        add_moments(total, layer, half)
    torch.testing.assert_close(W @ total[0] @ W.mT, columns @ columns.mT, rtol=1e-4, atol=1e-3)
    return total


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 9), lambda: Conv1D(9, 6)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("form", [None, Factored(6), Adapter(4, 8.0)], ids=["dense", "factored", "adapter"])
def test_of_linear_layers(make, form):
    torch.manual_seed(0)
    layer = make() if form is None else convert(make(), form).module
    x = torch.randn(4, 5, 6)
    y = (layer(x) - layer.bias).detach().reshape(-1, 9).mT
    if form is None:
        W = layer.weight.detach().mT if isinstance(layer, Conv1D) else layer.weight.detach()
    else:
        W = layer.matrix().detach()
    assert_moments(layer, x, W, y)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("form", [None, Factored(3)], ids=["dense", "factored"])
@pytest.mark.parametrize("patches", [1, module.PATCHES], ids=["a sample at a time", "at once"])
def test_of_convolutions(name, form, patches, monkeypatch):
    monkeypatch.setattr(module, "PATCHES", patches)
    torch.manual_seed(0)
    dense, size = CONVOLUTIONS[name]
    x = torch.randn(4, *size)
    W = dense.weight.detach().flatten(1)
    with torch.no_grad():
        y = dense(x) - dense.bias.view(-1, *(1,) * (len(size) - 1))
    layer = dense if form is None else convert(dense, form).module
    assert_moments(layer, x, W, y.transpose(0, 1).flatten(1))


def test_of_one_sample_without_a_batch():
    layer, x = nn.Conv2d(2, 20, 3, padding=1), torch.randn(2, 6, 7)
    one, batch = empty_moments(layer, x.device), empty_moments(layer, x.device)
    assert add_moments(one, layer, x) == add_moments(batch, layer, x[None]) == 42
    torch.testing.assert_close(one, batch, rtol=0, atol=0)


def test_of_a_grouped_convolution_each_group_has_its_own():
    torch.manual_seed(0)
    whole, x = nn.Conv2d(4, 10, 3, groups=2), torch.randn(3, 4, 6, 5)
    total = empty_moments(whole, x.device)
    count = add_moments(total, whole, x)
    assert (total.shape, count) == ((2, 18, 18), 3 * 4 * 3)
    for group in range(2):
        part, own = nn.Conv2d(2, 5, 3), x[:, 2 * group : 2 * group + 2]
        expected = empty_moments(part, x.device)
        add_moments(expected, part, own)
        torch.testing.assert_close(total[group], expected[0])


def test_autocast_and_half_precision_are_summed_in_float32():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(400, 6).bfloat16()
    total = empty_moments(layer.bfloat16(), x.device)
    with torch.autocast("cpu", torch.bfloat16):
        assert add_moments(total, layer, x) == 400
    assert total.dtype == torch.float32
    torch.testing.assert_close(total[0].double(), x.double().mT @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3)], ids=["1d", "2d"])
def test_others_are_refused(layer):
    with pytest.raises(ValueError, match=r"inputs of a ConvTranspose.d are not gathered: only of linear layers and co"):
        empty_moments(layer, torch.device("cpu"))


def test_the_layout_of_patches_is_that_of_the_kernel_as_a_matrix():
    layer = nn.Conv2d(2, 20, (3, 2))
    assert layout_of(layer).matrix(layer.weight).shape == (20, empty_moments(layer, torch.device("cpu")).shape[-1])
