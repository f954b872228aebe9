"""What the recipes on speed share: a Llama of 110 M parameters, a clock, interleaved timing, and a table."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import Dense, Form, weight_shape


def parser(text: str, **defaults: int) -> argparse.ArgumentParser:
    """Options of the model's size; the defaults are 110 M parameters, 85 M of them in linear layers of its blocks."""
    result = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "vocab": 16384, "length": 512, "rounds": 5}
    for name, value in (sizes | defaults).items():
        result.add_argument(f"--{name}", type=int, default=value)
    return result


def llama(chosen: argparse.Namespace) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=chosen.vocab, hidden_size=chosen.hidden, intermediate_size=chosen.intermediate,
            num_hidden_layers=chosen.layers, num_attention_heads=chosen.heads,
        )
    )  # fmt: skip


def dynamic(model: LlamaForCausalLM, schedule: str, **config: object) -> DynamicRank:
    """A controller, already in its first phase. ``schedule`` counts update steps; the run has 1,000."""
    drt = DynamicRank(model, DRTConfig(schedule=schedule, **config), max_steps=1000)
    drt.apply(0)
    return drt


def tokens(chosen: argparse.Namespace, batch: int = 1) -> Tensor:
    return torch.randint(0, chosen.vocab, (batch, chosen.length), generator=torch.Generator().manual_seed(0))


def clock() -> float:
    """CPU seconds of this process: on one thread what an idle machine's wall clock shows, others' load aside."""
    return time.process_time()


def timed(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def interleaved(works: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each piece of work, of rounds in which each has its turn."""
    seconds = {name: [] for name in works}
    for round_ in range(warmup + rounds):
        for name, work in works.items():
            spent = timed(work)
            if round_ >= warmup:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, micro_batches: int = 1
) -> Callable[[], None]:
    """One update step, as a piece of work; its gradients may come from several micro-batches."""

    def step() -> None:
        for _ in range(micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step_flops(drt: DynamicRank, form_of_layer: Callable[[str], Form], chosen: argparse.Namespace) -> float:
    """Multiply-adds of a training step per token: target layers, head, and the products of attention."""
    targets = sum(
        form_of_layer(name).flops(*weight_shape(drt.model.get_submodule(name)))
        for name in drt.targets
    )  # fmt: skip
    head = Dense().flops(chosen.vocab, chosen.hidden)
    attention = 3 * 2 * chosen.length * chosen.hidden * chosen.layers
    return targets + head + attention


def show(title: str, header: list[str], rows: list[list[str]], width: int = 110) -> None:
    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)
