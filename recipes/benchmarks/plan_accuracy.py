"""What `hf-drt plan --measure` predicts against the run that follows, on three architectures.

    python recipes/benchmarks/plan_accuracy.py [--steps 50] [--measure_steps 8] [--rounds 1]

What it shows, by model: the run's seconds, predicted from a few timed steps of each form, against those of a real
DRTTrainer run in a process of its own; and the peak of memory, predicted from shapes, against the largest resident set
of the phases. A process holds more than tensors, so what it holds after a run of a miniature of the model (libraries,
the kernels' code) is added to the prediction; the row of tensors compares without that. glibc's malloc keeps much of
what is freed, so memory is read in a short run of its own that gives freed memory back; the row of the allocator's
default is that of the timed run. Seconds of the CPU stand beside those of the clock: on a machine shared with others
the clock may not repeat within 10 % whatever is predicted; `--rounds` alternates predictions and runs, and adds up the
seconds of both. It reads the resident set under Linux.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, BertConfig, LlamaConfig, PretrainedConfig, ViTConfig

from hf_drt import DRTTrainer, DRTTrainingArguments
from hf_drt.cli.measurement import StepTimes, random_rows
from hf_drt.simulate import batch_spec

SCHEDULE = "factored@0 dense@40% adapter@80%"
MINIATURE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
# Name, class, configuration, batch size, tokens.
MODELS: list[tuple[str, str, PretrainedConfig, int, int]] = [
    ("Llama", "LlamaForCausalLM", LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
    ), 4, 128),
    ("BERT classifier", "BertForSequenceClassification", BertConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_labels=3,
    ), 8, 128),
    ("ViT", "ViTForImageClassification", ViTConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=96, patch_size=8,
        num_labels=10,
    ), 8, 1),
]  # fmt: skip


def predicted(folder: Path, batch_size: int, tokens: int, steps: int, measure_steps: int) -> dict:
    """What the command line says."""
    command = [
        sys.executable, "-m", "hf_drt.cli", "plan", str(folder), "--schedule", SCHEDULE, "--steps", str(steps),
        "--batch-size", str(batch_size), "--measure", "--measure-steps", str(measure_steps), "--json",
    ]  # fmt: skip
    command += ["--seq-length", str(tokens)] if tokens > 1 else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(folder: str, batch_size: int, tokens: int, steps: int) -> None:
    """The run itself; prints its times and peaks as JSON."""
    config = AutoConfig.from_pretrained(folder)
    small = AutoConfig.from_pretrained(folder, **MINIATURE)
    train(small, batch_size=2, tokens=8, steps=5)
    gc.collect()
    before = _resident_mib()
    log, times = train(config, batch_size, tokens, steps)
    phases = [row for row in log if "drt_phase_seconds" in row]
    result = {
        "seconds": sum(row["drt_phase_seconds"] for row in phases),
        "switches": sum(row["drt_switch_seconds"] for row in log if "drt_switch_seconds" in row),
        "cpu_seconds": sum(times.cpu_seconds),
        "before": before,
        "peaks": [row["drt_peak_memory_mib"] for row in phases],
    }
    print(json.dumps(result))


def train(config: PretrainedConfig, batch_size: int, tokens: int, steps: int) -> tuple[list[dict], StepTimes]:
    """A run of DRTTrainer on random data: its log, and the times of its steps."""
    torch.manual_seed(1)
    model = getattr(transformers, config.architectures[0])(config)
    data = random_rows(batch_spec(model, batch_size, tokens), batch_size * steps)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as out:
        arguments = DRTTrainingArguments(
            output_dir=out, max_steps=steps, per_device_train_batch_size=batch_size, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, drt_schedule=SCHEDULE,
        )  # fmt: skip
        trainer = DRTTrainer(model, arguments, train_dataset=data)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(times)
        trainer.train()
    return trainer.state.log_history, times


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def actual_run(folder: Path, batch_size: int, tokens: int, steps: int, **environment: str) -> dict:
    """:func:`run` in a process of its own."""
    command = [sys.executable, __file__, "--run", str(folder), str(batch_size), str(tokens), "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(name: str, rounds: list[tuple[dict, dict]], trimmed: dict) -> list[list[str]]:
    """Predicted and measured, by quantity: seconds summed over the rounds, memory of the last one."""
    prediction, actual = rounds[-1]
    peak, tensors = max(trimmed["peaks"]), prediction["peak"] / 2**20
    steps = sum(p["step_seconds"] for p, _ in rounds), sum(a["seconds"] for _, a in rounds)
    whole = sum(p["seconds"] for p, _ in rounds), sum(a["seconds"] + a["switches"] for _, a in rounds)
    pairs = {
        "seconds, steps and switches": whole,
        "seconds, steps": steps,
        "CPU seconds, steps": (sum(_cpu_seconds(p) for p, _ in rounds), sum(a["cpu_seconds"] for _, a in rounds)),
        "peak MiB, process": (trimmed["before"] + tensors, peak),
        "peak MiB, tensors": (tensors, peak - trimmed["before"]),
        "peak MiB, process, malloc's default": (actual["before"] + tensors, max(actual["peaks"])),
        "the same, from the timed steps": (
            max(phase["process_peak_mib"] for phase in prediction["phases"]),
            max(actual["peaks"]),
        ),
    }
    return [[name, what, f"{p:,.1f}", f"{a:,.1f}", f"{p / a - 1:+.1%}"] for what, (p, a) in pairs.items()]


def _cpu_seconds(prediction: dict) -> float:
    return sum(phase["cpu_seconds_per_step"] * (phase["end"] - phase["start"]) for phase in prediction["phases"])


def main() -> None:
    """Predict, run, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--measure_steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        return run(chosen.run[0], int(chosen.run[1]), int(chosen.run[2]), chosen.steps)
    table = Table(title=f"{SCHEDULE}, {chosen.steps} update steps, {chosen.measure_steps} timed per form")
    for title in ("model", "", "predicted", "measured", "error"):
        table.add_column(title, justify="left" if title in ("model", "") else "right")
    for name, architecture, config, batch_size, tokens in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            config.architectures = [architecture]
            config.save_pretrained(folder)
            load = (Path(folder), batch_size, tokens)
            rounds = [
                (predicted(*load, chosen.steps, chosen.measure_steps), actual_run(*load, chosen.steps))
                for _ in range(chosen.rounds)
            ]
            trimmed = actual_run(*load, 10, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_TOP_PAD_="0")
        for row in rows_of(name, rounds, trimmed):
            table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
