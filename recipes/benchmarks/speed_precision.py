"""Update steps in bf16 against fp32, of dense and of factored layers, alone and in a small Llama.

    python recipes/benchmarks/speed_precision.py

In CPU seconds on one thread, medians of rounds in which all variants have their turn. Where the CPU has no instructions
for products in bfloat16 the ratio says how many times as long they take; the default sizes are small for that reason.
"""

import argparse
from functools import partial

import speed_kit as kit
import torch
from torch import Tensor, nn

from hf_drt import DynamicRank
from hf_drt.forms import Dense, Factored, Form, convert
from hf_drt.precision import autocast, has_bf16_products
from hf_drt.schedule import DTYPES


def layers(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per shape and form: milliseconds of a forward and backward pass."""
    d, wide, rows = chosen.hidden, chosen.intermediate, []
    for out, into in ((d, d), (wide, d)):
        forms: dict[str, Form] = {"dense": Dense(), "factored d/8": Factored(d // 8)}
        x = torch.randn(chosen.length, into, requires_grad=True)
        for name, form in forms.items():
            layer = convert(nn.Linear(into, out, bias=False), form).module
            works = {dtype: partial(_passes, layer, x, dtype) for dtype in DTYPES}
            rows.append([f"{out} x {into}", name, *_cells(kit.interleaved(works, chosen.rounds), 1e3)])
    return rows


def _passes(layer: nn.Module, x: Tensor, dtype: str) -> None:
    with autocast(dtype, "cpu"):
        y = layer(x)
    y.backward(torch.ones_like(y))


def whole(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per form of the model's layers: seconds of an update step with AdamW."""
    ids, rows = kit.tokens(chosen), []
    for name, form in (("dense", "dense"), ("factored d/8", "factored:0.125")):
        works = {}
        for dtype in DTYPES:
            drt = kit.dynamic(kit.llama(chosen), f"{form}/{dtype}@0")
            works[dtype] = partial(_step, drt, kit.adamw(drt.model), ids)
        rows.append(["update step", name, *_cells(kit.interleaved(works, chosen.rounds), 1)])
    return rows


def _step(drt: DynamicRank, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    with drt.autocast():
        loss = drt.model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _cells(seconds: dict[str, float], unit: float) -> list[str]:
    return [
        f"{unit * seconds['fp32']:.3g}",
        f"{unit * seconds['bf16']:.3g}",
        f"{seconds['bf16'] / seconds['fp32']:.2f}",
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    sizes = {"hidden": 256, "intermediate": 512, "layers": 2, "heads": 4, "vocab": 2048, "length": 128, "rounds": 3}
    chosen = kit.parser(__doc__ or "", **sizes).parse_args(argv)
    torch.set_num_threads(1)
    print(f"instructions for products in bfloat16: {'yes' if has_bf16_products() else 'no'}")
    columns = ["", "form", "fp32", "bf16", "bf16 / fp32"]
    kit.show(f"layers, {chosen.length} tokens: milliseconds", columns, layers(chosen))
    kit.show("a small Llama: seconds", columns, whole(chosen))


if __name__ == "__main__":
    main()
