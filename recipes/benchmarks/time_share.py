"""What share of a dense update step of a task the target layers take: of its FLOPs, and of its time.

    python recipes/benchmarks/time_share.py brown_lm_wide fashion_vit_wide brown_tagger_wide

Time is that of the products of the target layers, forward and backward, by torch's profiler on one thread; everything
else, the optimizer's step included, is the rest. Only what these layers take can low rank save.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from experiment import QUIET, step_flops, used
from methods import base_settings
from tasks import build
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, set_seed

from hf_drt import DRTTrainer, DRTTrainingArguments, find_targets
from hf_drt.forms import weight_shape

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
WARM = 2


class Profiled(TrainerCallback):
    """Profiles the update steps after the first few."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM:
            self.profile.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.profile.stop()


def shares(name: str, cache: Path, steps: int) -> tuple[float, float]:
    """Of FLOPs and of time."""
    settings = base_settings(name, "dense")
    task = build(settings["kind"], settings["model"], settings["data"], cache)
    set_seed(1)
    model = task.model()
    layers = list(find_targets(model).targets.values())
    sizes = {frozenset(weight_shape(layer)) for layer in layers}
    watch = Profiled()
    training = {**QUIET, **used(settings["training"], model), "max_steps": WARM + steps}
    training = {key: value for key, value in training.items() if key != "matrix_rate"}
    with tempfile.TemporaryDirectory() as folder:
        args = DRTTrainingArguments(output_dir=folder, **training)
        trainer = DRTTrainer(model=model, args=args, train_dataset=task.train, data_collator=task.collate,
                             callbacks=[watch])  # fmt: skip
        flops = step_flops(trainer)
        trainer.train()
    events = watch.profile.key_averages(group_by_input_shape=True)
    whole = sum(event.self_cpu_time_total for event in events)
    own = [event for event in events if event.key in PRODUCTS and _is_of(event.input_shapes, sizes)]
    products = sum(_multiply_adds(event.input_shapes) * event.count for event in own)
    return 2 * products / (steps * flops), sum(event.self_cpu_time_total for event in own) / whole


def _is_of(shapes: list[list[int]], sizes: set[frozenset[int]]) -> bool:
    """Whether a product is one with a layer's weight, or that of its gradient: two of its three sizes are the layer's,
    the third is the number of tokens."""
    rows, inner, columns = _sizes(shapes)
    pairs = (frozenset(pair) for pair in ((rows, inner), (inner, columns), (rows, columns)))
    return any(pair in sizes for pair in pairs)


def _sizes(shapes: list[list[int]]) -> tuple[int, int, int]:
    left, right = [shape for shape in shapes if len(shape) >= 2][-2:]
    return left[-2], left[-1], right[-1]


def _multiply_adds(shapes: list[list[int]]) -> int:
    rows, inner, columns = _sizes(shapes)
    return rows * inner * columns


def main() -> None:
    """Print a line per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cache_dir", default="~/.cache/hf_drt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.tasks:
        flops, time = shares(name, Path(options.cache_dir).expanduser(), options.steps)
        print(f"{name}: target layers take {flops:.2f} of a dense step's FLOPs, {time:.2f} of its time", flush=True)


if __name__ == "__main__":
    main()
