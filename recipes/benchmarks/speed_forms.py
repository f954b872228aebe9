"""Step time and peak memory of every form, PEFT's LoRA, and GaLore, on one model and one rank.

    python recipes/benchmarks/speed_forms.py [--rank 192] [--methods dense factored adapter lora galore]

What it shows: a Llama of 110 M parameters trained with AdamW. Each method has a process of its own, so that its peak
memory is its own, and the processes take turns over the rounds. Seconds are CPU seconds on one thread, medians over all
measured steps; the first step, in which GaLore decomposes its gradients, stands apart. Peak memory is the resident set
under Linux, less what the process held before there was a model.

`lora` needs peft; `galore`, which is what transformers builds for optim="galore_adamw", needs galore-torch (and
bitsandbytes, which it imports). A method whose package is missing is left out, and said so.
"""

import argparse
import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import speed_kit as kit
import torch

from hf_drt.trainer.memory import read_peak, reset_peak

CPU = torch.device("cpu")
METHODS = {"dense": None, "factored": None, "adapter": None, "lora": "peft", "galore": "galore_torch"}
GALORE_GAP = 200  # steps between GaLore's decompositions, its default
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """PEFT's LoRA on the layers that hf_drt takes; embeddings, head and norms stay trainable, as they do there."""
    import peft

    kept = {id(p) for name, p in model.named_parameters() if not any(f"{layer}." in name for layer in PROJECTIONS)}
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=PROJECTIONS)
    wrapped = peft.get_peft_model(model, config)
    for p in wrapped.parameters():
        if id(p) in kept:
            p.requires_grad_(True)
    return wrapped


def galore(model: torch.nn.Module, rank: int) -> torch.optim.Optimizer:
    """GaLore's AdamW on the same layers, plain AdamW on the rest."""
    import galore_torch

    chosen = [p for name, p in model.named_parameters() if any(f"{layer}." in name for layer in PROJECTIONS)]
    rest = [p for p in model.parameters() if not any(p is c for c in chosen)]
    settings = {"rank": rank, "update_proj_gap": GALORE_GAP, "scale": 0.25, "proj_type": "std"}
    return galore_torch.GaLoreAdamW([{"params": rest}, {"params": chosen} | settings], lr=1e-4)


def made(method: str, chosen: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model as the method trains it, and its optimizer."""
    model = kit.llama(chosen)
    match method:
        case "factored" | "adapter":
            kit.dynamic(model, f"{method}@0", rank=chosen.rank)
        case "lora":
            model = with_lora(model, chosen.rank)
        case "galore":
            return model, galore(model, chosen.rank)
    return model, kit.adamw(model)


def measured(method: str, chosen: argparse.Namespace) -> dict:
    """One process: first step, later steps (seconds), trainable parameters, and peak memory (MiB)."""
    # Freed memory goes back to the system at once, or the resident set would show what was ever needed to make a model.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    torch.set_num_threads(1)
    reset_peak(CPU)
    before = read_peak(CPU)
    model, optimizer = made(method, chosen)
    step = kit.train_step(model, optimizer, kit.tokens(chosen, chosen.batch))
    first = kit.timed(step)
    reset_peak(CPU)
    seconds = [kit.timed(step) for _ in range(chosen.steps)]
    peak = read_peak(CPU)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "first": first,
        "seconds": seconds,
        "trainable": trainable,
        "peak": None if peak is None else peak - before,
    }


def in_process(method: str, arguments: list[str]) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--one", method]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(method: str, found: list[dict], dense: float | None) -> list[str]:
    seconds = statistics.median(s for one in found for s in one["seconds"])
    first = statistics.median(one["first"] for one in found)
    peaks = [one["peak"] for one in found if one["peak"] is not None]
    return [
        method, f"{found[0]['trainable'] / 1e6:.1f} M", f"{first:.2f}", f"{seconds:.2f}",
        "-" if dense is None else f"{seconds / dense:.3f}", f"{max(peaks):,.0f}" if peaks else "-",
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__, rounds=2)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each method in a round")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(measured(chosen.one, chosen)))
        return
    missing = {m for m in chosen.methods if METHODS[m] and importlib.util.find_spec(METHODS[m]) is None}
    for method in sorted(missing):
        print(f"{method} is left out: install {METHODS[method].replace('_', '-')}.")
    methods = [method for method in chosen.methods if method not in missing]
    found = {method: [] for method in methods}
    for _ in range(chosen.rounds):
        for method in methods:
            found[method].append(in_process(method, arguments))
    dense = statistics.median(s for one in found["dense"] for s in one["seconds"]) if "dense" in found else None
    title = f"Training step, {chosen.batch} x {chosen.length} tokens, rank {chosen.rank}, AdamW"
    header = ["method", "trainable", "first step, s", "step, s", "over dense", "peak MiB"]
    kit.show(title, header, [row(method, found[method], dense) for method in methods])


if __name__ == "__main__":
    main()
