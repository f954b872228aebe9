"""Forward and backward of the low-rank convolutions against dense ones, at the shapes of ResNet-20 and ResNet-50.

    python recipes/benchmarks/speed_convolutions.py [--only resnet20|resnet50] [--channels-last] [--rounds 5]
    python recipes/benchmarks/speed_convolutions.py --decompositions    # what a change of form costs instead

Seconds on one thread, medians of rounds in which all variants have their turn: time over that of the dense convolution
of the same run, next to the ratio of multiply-adds. Their quotient is 1 if a low-rank chain costs per multiply-add what
the dense convolution does. Ranks are half and a quarter of the output channels (of the input channels in Tucker).
"""

import argparse

import speed_kit as kit
import torch
from speed_layers import backward_of
from torch import nn

from hf_drt import DRTConfig
from hf_drt.forms import Dense, Form, convert, decompose, empty_like, flops_of, weight_shape
from hf_drt.planning import resolve_form

# Batch, and (size of the image, input channels, output channels, kernel).
SHAPES = {
    "resnet20": (128, [(32, 16, 16, 3), (16, 32, 32, 3), (8, 64, 64, 3)]),
    "resnet50": (
        8,
        [
            (56, 64, 64, 3), (28, 128, 128, 3), (14, 256, 256, 3), (7, 512, 512, 3),
            (56, 64, 256, 1), (28, 512, 128, 1), (14, 1024, 256, 1), (7, 512, 2048, 1),
        ],
    ),
}  # fmt: skip


def measured(network: str, chosen: argparse.Namespace) -> list[list[str]]:
    """One row per shape, form and rank."""
    batch, shapes = SHAPES[network]
    memory = torch.channels_last if chosen.channels_last else torch.contiguous_format
    rows = []
    for size, channels, out, kernel in shapes:
        layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        shape = weight_shape(layer)
        forms = {"dense": Dense()}
        for decomposition in ("svd", "tucker", "cp") if kernel > 1 else ("svd",):
            for ratio in chosen.ratios:
                config = DRTConfig(decomposition=decomposition, rank_ratio=ratio)
                forms[f"{decomposition} {ratio:g}"] = resolve_form("factored", shape, config, "", None)
        adapter = DRTConfig(rank_ratio=min(chosen.ratios))
        forms[f"svd adapter {min(chosen.ratios):g}"] = resolve_form("adapter", shape, adapter, "", None)
        forms = {name: form for name, form in forms.items() if name == "dense" or form != Dense()}
        x = torch.randn(batch, channels, size, size).contiguous(memory_format=memory).requires_grad_()
        gradient = torch.randn(batch, out, size, size).contiguous(memory_format=memory)
        modules = {name: _layer(channels, out, kernel, form).to(memory_format=memory) for name, form in forms.items()}
        works = {name: backward_of(module, x, gradient) for name, module in modules.items()}
        seconds = kit.interleaved(works, chosen.rounds, warmup=1)
        for name in list(forms)[1:]:
            ratio, flops = seconds[name] / seconds["dense"], flops_of(forms[name], shape) / flops_of(Dense(), shape)
            times = [f"{1e3 * seconds['dense']:.1f}", f"{1e3 * seconds[name]:.1f}", f"{ratio:.2f}"]
            what = f"{kernel}x{kernel}, {size}x{size}, {channels} to {out}"
            rows.append([what, name, *times, f"{flops:.2f}", f"{ratio / flops:.2f}"])
    return rows


def _layer(channels: int, out: int, kernel: int, form: Form) -> nn.Module:
    """A layer in a form; its values do not matter for time, so that nothing is decomposed."""
    layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    if form == Dense():
        return convert(layer, form).module
    module = empty_like(layer, form)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def decomposition_seconds(channels: int) -> list[str]:
    """One row: a kernel of random numbers, at half of its channels, decomposed once in each of the three ways."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    row = [f"3x3, {channels} to {channels}"]
    for decomposition in ("svd", "tucker", "cp"):
        config = DRTConfig(decomposition=decomposition, rank_ratio=0.5)
        form = resolve_form("factored", weight_shape(layer), config, "", None)
        row.append(f"{kit.timed(lambda form=form: decompose(layer, form)):.2f}")
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__)
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--channels-last", action="store_true", help="images and kernels in this memory format")
    parser.add_argument("--decompositions", action="store_true", help="seconds of the decompositions, nothing else")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="ranks, of the output channels")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.decompositions:
        rows = [decomposition_seconds(channels) for channels in (16, 64, 256)]
        kit.show("Seconds of one decomposition, rank 1/2", ["kernel", "svd", "tucker", "cp"], rows)
        return
    header = ["convolution", "form", "dense ms", "ms", "over dense", "multiply-adds", "quotient"]
    for network in [chosen.only] if chosen.only else SHAPES:
        kit.show(f"Forward and backward, {network}, batch {SHAPES[network][0]}", header, measured(network, chosen))


if __name__ == "__main__":
    main()
