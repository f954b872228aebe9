"""Step time of DRTTrainer with DRT off against transformers' Trainer, in one process, in alternation.

    python recipes/overhead.py

What it shows: the ratio of the medians, which should be 1 within noise (2 %). It says nothing about DRT switched on.
"""

import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_drt import DRTTrainer, DRTTrainingArguments

STEPS, ROUNDS, WARMUP = 40, 8, 5


class StepTimes(TrainerCallback):
    """Seconds of every update step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def run(trainer_cls, arguments_cls) -> list[float]:
    """Step times of one short run, warm-up left out."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=2
    )
    torch.manual_seed(0)
    rows = torch.randint(0, 1024, (STEPS * 4, 64)).tolist()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_cls(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = trainer_cls(LlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[times])
        trainer.log = lambda *args, **kwargs: None
        trainer.train()
    return times.seconds[WARMUP:]


def main() -> float:
    """Alternate both trainers and print the ratio of their median step times."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs += run(Trainer, TrainingArguments)
        ours += run(DRTTrainer, DRTTrainingArguments)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"Trainer                  {1e3 * statistics.median(theirs):.2f} ms per step (median of {len(theirs)})")
    print(f"DRTTrainer with DRT off  {1e3 * statistics.median(ours):.2f} ms, ratio {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    main()
