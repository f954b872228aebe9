"""What changes of form, and metrics at intervals, cost: in seconds, and in dense training steps of the same model.

    python recipes/benchmarks/speed_switches.py

What it shows, for a Llama of 110 M parameters, in CPU seconds on one thread: every kind of switch, with the optimizer's
part in it, over one dense update step of 8 x 512 tokens (AdamW, one sequence at a time). The aim is less than one step
for inflation and for an adapter of product zero, and less than ten for a deflation. Next to a switch that decomposes
weights stands the time of torch.linalg.svd on the same ones. The second table has the effective ranks of all layers,
from the Gram matrix where that is accurate and from torch.linalg.svdvals, and what they cost a run that logs them at
intervals. Peak memory is in recipes/switch_cost.py.
"""

import argparse
from collections.abc import Callable

import speed_kit as kit
import torch

from hf_drt import DynamicRank
from hf_drt.forms import FactoredLinear, effective_weight
from hf_drt.linalg.spectral import effective_rank

# From, to, and the start of the adapter.
SWITCHES = [
    ("dense", "factored", "zero"),
    ("factored", "dense", "zero"),
    ("factored", "factored", "zero"),
    ("dense", "adapter", "zero"),
    ("adapter", "adapter", "zero"),
    ("adapter", "dense", "zero"),
    ("dense", "adapter", "principal"),
    ("adapter", "factored", "zero"),
]


def on_every_layer(drt: DynamicRank, work: Callable[[torch.Tensor], object]) -> float:
    """Seconds of a decomposition of every target layer's W."""
    return kit.timed(lambda: [work(effective_weight(drt.model.get_submodule(name))) for name in drt.targets])


def full_svd(W: torch.Tensor) -> object:
    return torch.linalg.svd(W, full_matrices=False)


def switch(before: str, after: str, init: str, chosen: argparse.Namespace) -> tuple[float, float | None]:
    """Seconds of one switch of a model in training, and of full SVDs in its place, if it decomposes anything."""
    drt = kit.dynamic(kit.llama(chosen), f"{before}@0 {after}@1", adapter_init=init)
    optimizer = kit.adamw(drt.model)
    drt.begin_step(0, optimizer)
    kit.train_step(drt.model, optimizer, kit.tokens(chosen)[:, :16])()
    decomposes = after == "factored" or init == "principal"
    plain = on_every_layer(drt, full_svd) if decomposes else None
    return kit.timed(lambda: drt.begin_step(1, optimizer)), plain


def metrics(chosen: argparse.Namespace, step: float) -> list[list[str]]:
    """One row per form: seconds of all effective ranks, and their share of a run that logs every so many steps."""
    rows = []
    for form in ("dense", "factored"):
        drt = kit.dynamic(kit.llama(chosen), f"{form}@0")
        values = kit.timed(drt.effective_ranks)
        plain = on_every_layer(drt, lambda W: effective_rank(torch.linalg.svdvals(W)))
        factored = any(isinstance(drt.model.get_submodule(name), FactoredLinear) for name in drt.targets)
        shares = [f"{values / (values + every * step):.2%}" for every in chosen.every]
        rows.append([form, f"{values:.2f}", f"{plain:.2f}" + (" (of U V)" if factored else ""), *shares])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences in the dense step")
    parser.add_argument("--every", type=int, nargs="+", default=[10, 100, 1000], help="intervals of metrics, in steps")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    net = kit.llama(chosen)
    work = kit.train_step(net, kit.adamw(net), kit.tokens(chosen), chosen.batch)
    kit.train_step(net, kit.adamw(net), kit.tokens(chosen))()
    step = kit.timed(work)
    del net, work
    rows = []
    for before, after, init in SWITCHES:
        seconds, plain = switch(before, after, init, chosen)
        name = f"{before} -> {after}" + (" (principal)" if init == "principal" else "")
        full = ["-", "-"] if plain is None else [f"{plain:.2f}", f"{plain / seconds:.1f} x"]
        rows.append([name, f"{seconds:.2f}", f"{seconds / step:.3f}", *full])
    title = f"Switches; one dense step of {chosen.batch} x {chosen.length} tokens takes {step:.1f} s"
    kit.show(title, ["switch", "seconds", "dense steps", "full SVDs, s", "over the switch"], rows)
    header = ["layers", "seconds", "svdvals, s", *(f"every {every} steps" for every in chosen.every)]
    kit.show("Effective ranks of all layers, and their share of the run", header, metrics(chosen, step))


if __name__ == "__main__":
    main()
