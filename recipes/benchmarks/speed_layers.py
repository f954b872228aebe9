"""Forward and backward of the low-rank layers against dense ones, alone and in a Llama of 110 M parameters.

    python recipes/benchmarks/speed_layers.py [--only layers|model|shared]

What it shows, in CPU seconds on one thread, medians of rounds in which all variants have their turn:

- layers: time over that of a dense layer, next to the same ratio of multiply-adds. Their quotient is 1 if a low-rank
  product costs per multiply-add what a dense one does; at most 1.10 is the aim for factors.
- model: a whole update step with AdamW over that of the dense model, next to the ratio of all multiply-adds (target
  layers, head, attention). At most 1.15 is the aim for factors.
- shared: one product of the stacked V of projections that read the same input, against one product each. Not part of
  the package: it shows what it would be worth.
"""

import argparse
import itertools
from collections.abc import Callable

import speed_kit as kit
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms import Adapter, Dense, Factored, Form, convert, form_of


def layer_shapes(chosen: argparse.Namespace) -> list[tuple[int, int]]:
    """``(out, in)`` of a block's layers."""
    d, wide = chosen.hidden, chosen.intermediate
    return [(d, d), (wide, d), (d, wide)]


def backward_of(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Forward and backward of one layer, as a piece of work."""

    def work() -> None:
        layer(x).backward(gradient)
        x.grad = None
        layer.zero_grad()

    return work


def layers(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per shape, number of tokens and form."""
    rows = []
    for (out, into), count in itertools.product(layer_shapes(chosen), chosen.tokens):
        d = min(out, into)
        forms: list[Form] = [Dense(), Factored(d // 8), Factored(d // 4), Factored(d // 2), Adapter(d // 16)]
        x, gradient = torch.randn(count, into, requires_grad=True), torch.randn(count, out)
        modules = {form: convert(nn.Linear(into, out, bias=False), form).module for form in forms}
        works = {str(form): backward_of(module, x, gradient) for form, module in modules.items()}
        seconds = kit.interleaved(works, chosen.rounds, warmup=2)
        for form in forms[1:]:
            mine, dense = seconds[str(form)], seconds[str(Dense())]
            flops = form.flops(out, into) / Dense().flops(out, into)
            name = f"{type(form).__name__} {form.rank}"
            times = [f"{1e3 * dense:.1f}", f"{1e3 * mine:.1f}", f"{mine / dense:.3f}"]
            rows.append([f"{out} x {into}", str(count), name, *times, f"{flops:.3f}", f"{mine / dense / flops:.2f}"])
    return rows


def whole(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per form of the model's blocks."""
    schedules = {"dense": "dense@0", "factored": "factored@0", "adapter": "adapter@0"}
    drts = {name: kit.dynamic(kit.llama(chosen), schedule) for name, schedule in schedules.items()}
    ids = kit.tokens(chosen, chosen.batch)
    works = {name: kit.train_step(drt.model, kit.adamw(drt.model), ids) for name, drt in drts.items()}
    seconds = kit.interleaved(works, chosen.rounds)
    rows = []
    for name, drt in drts.items():
        flops = kit.step_flops(drt, lambda layer, drt=drt: form_of(drt.model.get_submodule(layer)), chosen)
        dense = kit.step_flops(drt, lambda layer: Dense(), chosen)
        ratio = seconds[name] / seconds["dense"]
        rows.append(
            [name, f"{seconds[name]:.2f}", f"{ratio:.3f}", f"{flops / dense:.3f}", f"{ratio / (flops / dense):.2f}"]
        )
    return rows


def shared(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per group of projections and rank."""
    d, count, rows = chosen.hidden, max(chosen.tokens), []
    groups = {"q, k, v": (d, d, d), "gate, up": (chosen.intermediate, chosen.intermediate)}
    for (name, outs), rank in itertools.product(groups.items(), (d // 8, d // 4)):
        x = torch.randn(count, d, requires_grad=True)
        U, V = [torch.randn(out, rank).requires_grad_() for out in outs], torch.randn(len(outs) * rank, d)
        own, stacked = [part.clone().requires_grad_() for part in V.split(rank)], V.clone().requires_grad_()
        gradients = [torch.randn(count, out) for out in outs]

        def apart(x: Tensor = x, U: list = U, own: list = own) -> list[Tensor]:
            return [F.linear(F.linear(x, v), u) for u, v in zip(U, own, strict=True)]

        def together(x: Tensor = x, U: list = U, stacked: Tensor = stacked, rank: int = rank) -> list[Tensor]:
            return [F.linear(h, u) for u, h in zip(U, F.linear(x, stacked).split(rank, -1), strict=True)]

        works = {
            "apart": lambda g=gradients, f=apart: torch.autograd.backward(f(), g),
            "together": lambda g=gradients, f=together: torch.autograd.backward(f(), g),
        }
        seconds = kit.interleaved(works, chosen.rounds)
        gain = 1 - seconds["together"] / seconds["apart"]
        rows.append([name, str(rank), *(f"{1e3 * s:.1f}" for s in seconds.values()), f"{gain:.1%}"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__)
    parser.add_argument("--only", choices=["layers", "model", "shared"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of the layers alone")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step of the whole model")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratios = ["over dense", "multiply-adds", "quotient"]
    if chosen.only in (None, "layers"):
        header = ["out x in", "tokens", "form", "dense ms", "ms", *ratios]
        kit.show("Forward and backward of one layer", header, layers(chosen))
    if chosen.only in (None, "model"):
        title = f"Update step of the model, {chosen.batch} x {chosen.length} tokens, AdamW, rank_ratio 0.25"
        kit.show(title, ["blocks", "seconds", *ratios], whole(chosen))
    if chosen.only in (None, "shared"):
        header = ["projections", "rank", "apart ms", "together ms", "gain"]
        kit.show(f"Factored projections of one input, {max(chosen.tokens)} tokens", header, shared(chosen))


if __name__ == "__main__":
    main()
