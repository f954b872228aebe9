"""Real update steps of every phase of a plan on this machine: what a step and a switch take."""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from hf_drt.config import DRTConfig
from hf_drt.planning import settled
from hf_drt.schedule import Plan
from hf_drt.simulate import BatchSpec
from hf_drt.trainer import DRTTrainer, DRTTrainingArguments, unused


@dataclass(frozen=True)
class PhaseTime:
    """What was measured of one phase.

    Attributes:
        seconds: Of an update step, the median of the steps.
        cpu_seconds: The same of the process's CPU time, which repeats better on a machine shared with others.
        switch: Seconds of the switch into the phase.
        peak: MiB of the process on a CPU, of the allocator on an accelerator; None where the platform does not tell.
    """

    seconds: float
    cpu_seconds: float
    switch: float
    peak: float | None


class StepTimes(TrainerCallback):
    """Seconds of every update step, by the clock and of the CPU.

    Added after DRT's own callback, so that a switch is over when a step begins.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started[0])
        self.cpu_seconds.append(time.process_time() - self._started[1])


class _Rows(Dataset):
    """One random batch's rows, over and over."""

    def __init__(self, batch: dict[str, Tensor], length: int):
        self._batch, self._length = batch, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index % len(tensor)] for name, tensor in self._batch.items()}


def random_rows(batch: BatchSpec, length: int) -> Dataset:
    """A data set of random rows that the model takes, the same ones every time."""
    return _Rows(batch.random(torch.Generator().manual_seed(0)), length)


def measured(
    model: nn.Module, batch: BatchSpec, plan: Plan, config: DRTConfig, steps: int, **settings: Any
) -> tuple[PhaseTime, ...]:
    """Train every phase of a plan for a few steps on random data, and time it.

    Args:
        model: With real weights; it is trained.
        batch: Of one forward pass.
        plan: Whose phases are made, each ``steps`` long.
        config: Ranks and all else, with the schedule of which the plan was made.
        steps: Update steps per phase, of which the first is not counted.
        settings: Training arguments: batch size, accumulation, optimizer, precision.
    """
    phases, config = plan.phases, settled(config, model)
    text = " ".join(f"{phase.form}@{index * steps}" for index, phase in enumerate(phases))
    own = replace(config, schedule=text, dense_query_key=config.keeps_query_key, log_rank_steps=0,
                  log_rank_per_layer=False, evaluate_at_switch=False, save_at_switch=False, tag_phases=False,
                  export="dense")  # fmt: skip
    # What has made the phases, a budget for one, has no effect on a text that names them.
    own = replace(own, **{name: DRTConfig.__dataclass_fields__[name].default for name, _ in unused(model, own)})
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DRTTrainingArguments(
            output_dir=str(Path(folder)), max_steps=steps * len(phases), report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-5, **settings,
        )  # fmt: skip
        rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.max_steps
        trainer = DRTTrainer(model, arguments, train_dataset=random_rows(batch, rows), drt=own)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times)
        trainer.train()
    return tuple(_phase_time(index, steps, times, trainer.state.log_history) for index in range(len(phases)))


def _phase_time(index: int, steps: int, times: StepTimes, log: list[dict[str, Any]]) -> PhaseTime:
    own = [row for row in log if row.get("drt_phase") == index]
    switch = next(row["drt_switch_seconds"] for row in own if "drt_switch_seconds" in row)
    end = next(row for row in own if "drt_phase_steps" in row)
    counted = slice(index * steps + 1, (index + 1) * steps)
    seconds, cpu = (statistics.median(series[counted]) for series in (times.seconds, times.cpu_seconds))
    return PhaseTime(seconds, cpu, switch, end.get("drt_peak_memory_mib"))
