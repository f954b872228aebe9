"""Forward and backward of fused experts in each form against dense ones.

    python recipes/benchmarks/speed_experts.py

What it shows, in CPU seconds on one thread, medians of rounds in which all variants have their turn: the experts of one
Mixtral block (gate, up and down projection, activation and weighting), alone, in each implementation that transformers
has. Next to the time over that of dense experts stands the same ratio of multiply-adds; their quotient is 1 if a
low-rank product costs per multiply-add what a dense one does. batched_mm copies the matrices of every token, and is
meant for few tokens: it is measured with --few of them.
"""

import argparse
from collections.abc import Callable

import speed_kit as kit
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_drt.forms import Adapter, Dense, Factored, Form, attach, layer_of, prepare, weight_shape

LEAVES = ("gate_up_proj", "down_proj")


def experts_in(chosen: argparse.Namespace, implementation: str, form: Form) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=chosen.hidden, intermediate_size=chosen.intermediate, num_local_experts=chosen.experts
    )
    config._experts_implementation_internal = implementation
    module = MixtralExperts(config)
    for leaf in LEAVES:
        nn.init.normal_(getattr(module, leaf), std=0.02)
        conversion = prepare(layer_of(module, leaf), form)
        attach(module, leaf, conversion.module)
        conversion.commit()
    return module


def backward_of(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Callable[[], None]:
    """Forward and backward of the experts, as a piece of work."""
    gradient = torch.randn_like(x)

    def work() -> None:
        module(x, index, weights).backward(gradient)
        x.grad = None
        module.zero_grad()

    return work


def rows(chosen: argparse.Namespace) -> list[list[str]]:
    """One row per implementation and form."""
    d = min(chosen.hidden, chosen.intermediate)
    forms: list[Form] = [Dense(), Factored(d // 8), Factored(d // 4), Adapter(d // 16)]
    result = []
    for implementation, count in (("grouped_mm", chosen.length), ("eager", chosen.length), ("batched_mm", chosen.few)):
        x = torch.randn(count, chosen.hidden, requires_grad=True)
        index = torch.rand(count, chosen.experts).topk(chosen.active).indices
        weights = torch.full((count, chosen.active), 1 / chosen.active)
        modules = {form: experts_in(chosen, implementation, form) for form in forms}
        works = {str(form): backward_of(module, x, index, weights) for form, module in modules.items()}
        seconds = kit.interleaved(works, chosen.rounds)
        shapes = [weight_shape(layer_of(modules[Dense()], leaf)) for leaf in LEAVES]
        dense = seconds[str(Dense())]
        for form in forms[1:]:
            mine = seconds[str(form)]
            flops = sum(form.flops(*s) for s in shapes) / sum(Dense().flops(*s) for s in shapes)
            times = [f"{1e3 * dense:.0f}", f"{1e3 * mine:.0f}", f"{mine / dense:.3f}"]
            name = f"{type(form).__name__} {form.rank}"
            result.append([implementation, str(count), name, *times, f"{flops:.3f}", f"{mine / dense / flops:.2f}"])
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__, intermediate=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2, help="experts per token")
    parser.add_argument("--few", type=int, default=16, help="tokens for batched_mm")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    header = ["experts", "tokens", "form", "dense ms", "ms", "over dense", "multiply-adds", "quotient"]
    title = f"{chosen.experts} experts of {chosen.hidden} x {chosen.intermediate}, {chosen.active} per token"
    kit.show(title, header, rows(chosen))


if __name__ == "__main__":
    main()
