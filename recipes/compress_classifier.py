"""Compress a fine-tuned classifier to several budgets, recover it, and measure what that costs and what it saves.

With no argument: the packaged MiniLM, fine-tuned densely on 1,600 sentences of film reviews (a minute), then cut to
0.75, 0.6 and 0.4 of the weights of its 36 linear layers. With `--model_name_or_path`, a classifier that has been
fine-tuned already, such as the folder that finetune_classifier.py writes:

    python recipes/compress_classifier.py
    python recipes/compress_classifier.py --model_name_or_path runs/finetune_classifier --budgets 0.9 0.75 0.5

Three rows per budget: by the weights alone, calibrated on batches of the training sentences, and recovered on the same
batches (hf_drt.recovery), by what the dense model says of them: no label is used. Each has parameters of the whole
model, forward FLOPs of the target layers by count (of the dense ones' 1), root mean square of the layers' relative
truncation errors, accuracy, and time of one batch, compressed and dense by turns in this process, on one thread.

What it shows: the weights of a dense model have no low rank, and accuracy falls with them; what the layers do with
their inputs has less, and a short training regains most of the rest. FLOPs fall as counted, and the time with them,
though by less, since attention, embeddings and norms stay as they are.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from finetune_classifier import RecipeArguments, load_data, load_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DataCollatorWithPadding

from hf_drt.compress import Compression, compress
from hf_drt.recovery import recover

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One budget and way: what compression says of it, and what was measured before and after."""

    budget: float
    way: str
    result: Compression
    accuracy: tuple[float, float]
    milliseconds: tuple[float, float]

    @property
    def error(self) -> float:
        """Root mean square over the layers of the relative truncation error."""
        return math.sqrt(self.result.squared_error / len(self.result.layers))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_name_or_path", help="Folder of a fine-tuned classifier; unset: MiniLM, fine-tuned here.")
    add("--cache_dir", default="~/.cache/hf_drt", help="Folder in which the snippets are kept.")
    add("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.4], help="Shares of the target layers' weights.")
    add("--train_steps", type=int, default=50, help="Update steps of 32 sentences, without --model_name_or_path.")
    add("--max_eval_samples", type=int, default=600, help="Evaluate on so many.")
    add("--calibration_batches", type=int, default=48, help="Of 32 sentences to calibrate and recover on, at least 1.")
    add("--recover_steps", type=int, default=200, help="Updates of the recovery, at least 1.")
    add("--repeats", type=int, default=11, help="Timed passes of each model, at least 1; the median counts.")
    add("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if bad := [share for share in given.budgets if not 0 < share < 1]:
        parser.error(f"--budgets must be shares in (0, 1), with a decimal point, got {bad[0]:g}.")
    for name in ("train_steps", "max_eval_samples", "calibration_batches", "recover_steps", "repeats"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}.")
    return given


def fine_tuned(given: argparse.Namespace) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """A classifier in dense form, and batches for calibration and for evaluation, of like length each."""
    torch.manual_seed(given.seed)
    model, tokenizer = load_model(given.model_name_or_path)
    recipe = RecipeArguments(cache_dir=given.cache_dir, max_eval_samples=given.max_eval_samples)
    data = load_data(recipe, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    keep = ("input_ids", "attention_mask", "label")
    train, test = ([{key: row[key] for key in keep} for row in data[split]] for split in ("train", "test"))
    if given.model_name_or_path is None:
        fine_tune(model, train, collate, given.train_steps)
    drawn = [random_batch(train, collate) for _ in range(given.calibration_batches)]
    return model.eval(), drawn, [dict(collate(test[i : i + 32])) for i in range(0, len(test), 32)]


def random_batch(rows: list[dict], collate: DataCollatorWithPadding) -> Batch:
    """32 sentences of like length, drawn by torch's generator."""
    drawn = sorted((rows[i] for i in torch.randint(len(rows), (256,)).tolist()), key=lambda r: len(r["input_ids"]))
    first = int(torch.randint(len(drawn) - 31, ()))
    return dict(collate(drawn[first : first + 32]))


def fine_tune(model: nn.Module, rows: list[dict], collate: DataCollatorWithPadding, steps: int) -> None:
    """Dense fine-tuning, with a linearly falling LR, on random batches of sentences of like length."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**random_batch(rows, collate)).loss.backward()
        optimizer.step()
        fall.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Share of right answers."""
    hits = [(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in batches]
    return torch.cat(hits).mean().item()


@torch.no_grad()
def milliseconds(models: tuple[nn.Module, ...], batch: Batch, repeats: int) -> tuple[float, ...]:
    """Median time of one forward pass by model, on one thread. They take turns, so that what else the machine does
    meets all."""
    times: list[list[float]] = [[] for _ in models]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(repeats + 2):
            for model, own in zip(models, times, strict=True):
                started = time.perf_counter()
                model(**batch)
                if turn >= 2:  # the first passes warm up
                    own.append(1000 * (time.perf_counter() - started))
    finally:
        torch.set_num_threads(threads)
    return tuple(map(statistics.median, times))


def measure(
    model: nn.Module,
    calibration: list[Batch],
    batches: list[Batch],
    budget: float,
    recover_steps: int,
    repeats: int,
) -> list[Row]:
    """Compress copies in each way, evaluate them and time them against the original."""
    before, timed, rows = accuracy(model, batches), batches[len(batches) // 2], []

    def add(way: str, smaller: nn.Module, result: Compression) -> None:
        accuracies = before, accuracy(smaller.eval(), batches)
        rows.append(Row(budget, way, result, accuracies, milliseconds((model, smaller), timed, repeats)))

    by_weight, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    add("weights", by_weight, compress(by_weight, parameters=budget))
    result = compress(calibrated, parameters=budget, calibration=calibration)
    add("calibrated", calibrated, result)
    recover(calibrated, model, calibration, steps=recover_steps)
    add("recovered", calibrated, result)
    return rows


def print_rows(rows: list[Row]) -> None:
    """The table."""
    table = Table(title=f"{len(rows[0].result.layers)} target layers, timed on one thread", title_justify="left")
    for title in ("budget", "way", "parameters", "factored", "FLOPs", "error", "accuracy", "ms dense", "ms", "time"):
        table.add_column(title, justify="right")
    whole, (accurate, _) = rows[0].result.model_parameters[0], rows[0].accuracy
    table.add_row("dense", "", f"{whole:,}", "0", "1.000", "0", f"{accurate:.4f}", "", "", "")
    for row in rows:
        factored = sum(layer.rank is not None for layer in row.result.layers)
        dense, own = row.milliseconds
        table.add_row(
            f"{row.budget:g}", row.way, f"{row.result.model_parameters[1]:,}", str(factored), f"{row.result.flops:.3f}",
            f"{row.error:.3f}", f"{row.accuracy[1]:.4f}", f"{dense:.1f}", f"{own:.1f}", f"{own / dense:.2f}",
        )  # fmt: skip
    Console(width=max(Console().width, 100)).print(table)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Fine-tune or load, compress to each budget in each way, print the table."""
    given = parse(arguments)
    started = time.perf_counter()
    model, calibration, batches = fine_tuned(given)
    how = (given.recover_steps, given.repeats)
    rows = [row for budget in given.budgets for row in measure(model, calibration, batches, budget, *how)]
    print_rows(rows)
    print(f"accuracy on {sum(len(batch['labels']) for batch in batches):,} sentences; timed on one batch of ", end="")
    print(
        f"{tuple(batches[len(batches) // 2]['input_ids'].shape)} tokens; {time.perf_counter() - started:.0f} s in all."
    )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
