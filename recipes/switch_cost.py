"""What a switch costs on a model of 100 M parameters: time per layer, and peak memory against the phases around it.

    python recipes/switch_cost.py [--moments project]

What it shows: one row per switch. The peak of a switch should be at most that of the larger of the two phases plus one
layer (weight, gradient and AdamW moments), though the phases here train on one short sequence, so that activations hide
nothing. Seconds on a shared machine are noisy; compare them with the training step of the same table. It runs on the
CPU, and reads the process's resident set under Linux.
"""

import argparse
import ctypes
import itertools
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hf_drt import DRTConfig, DynamicRank, Transition
from hf_drt.trainer.memory import read_peak, reset_peak

PLAN = "dense@0 factored@2 dense@4 adapter@6 adapter@8 dense@10 factored@12 adapter@14"
CPU = torch.device("cpu")


def model() -> LlamaForCausalLM:
    """A Llama of 110 M parameters, 85 M of them in linear layers of its blocks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
        )
    )


def peak_of(work: Callable[[], object]) -> tuple[object, float, float]:
    """Result, peak MiB and seconds of a piece of work."""
    reset_peak(CPU)
    started = time.perf_counter()
    result = work()
    return result, read_peak(CPU), time.perf_counter() - started


def train(net: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Update steps on one short sequence."""
    batch = torch.arange(16)[None]
    for _ in range(steps):
        net(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(config: DRTConfig) -> list[tuple[Transition, float, float, float]]:
    """One row per phase: its switch, the switch's peak, the phase's peak (MiB), and seconds of a training step."""
    net = model()
    drt = DynamicRank(net, config, max_steps=16)
    drt.apply(0)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    rows = []
    for phase in drt.plan.phases:
        transition, switch, _ = peak_of(lambda step=phase.start: drt.begin_step(step, optimizer))
        _, training, seconds = peak_of(lambda: train(net, optimizer))
        rows.append((transition, switch, training, seconds / 2))
    return rows


def main() -> bool:
    """Print the table; True if no switch needed more than its phases and a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", choices=["reset", "project"], default="reset")
    parser.add_argument("--adapter_init", choices=["zero", "principal"], default="zero")
    chosen = parser.parse_args()
    # Freed layers go back to the system at once, or the resident set would show what the process has ever needed.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    rows = measure(DRTConfig(schedule=PLAN, moments=chosen.moments, adapter_init=chosen.adapter_init))
    layer = 4 * 768 * 2048 * 4 / 2**20
    table = Table(title=f"Llama of 110 M parameters, AdamW, {PLAN}, moments={chosen.moments}")
    for title in ("switch", "layers", "seconds", "ms per layer", "steps' worth", "peak MiB", "of phases", "+ a layer"):
        table.add_column(title, justify="left" if title == "switch" else "right")
    within = True
    for (_, _, before, step_before), (switch, peak, after, step_after) in itertools.pairwise(rows):
        kinds = f"{PLAN.split()[switch.phase - 1].split('@')[0]} -> {switch.kind}"
        bound = max(before, after) + layer
        within &= peak <= bound
        table.add_row(
            kinds, f"{switch.layers}", f"{switch.seconds:.2f}", f"{1e3 * switch.seconds / switch.layers:.1f}",
            f"{switch.seconds / max(step_before, step_after):.1f}", f"{peak:,.0f}", f"{max(before, after):,.0f}",
            "yes" if peak <= bound else "NO",
        )  # fmt: skip
    Console(width=110).print(table)
    return within


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
