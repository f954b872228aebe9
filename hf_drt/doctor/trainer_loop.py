"""A short run of a Trainer through every form, under an engine that its own library begins: as :mod:`trial_loop`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_drt.doctor.model import Decoder, decoder, next_token_loss
from hf_drt.doctor.trial_loop import (
    LEARNING_RATE,
    RANK,
    ROWS,
    SAVED,
    SCHEDULE,
    SIZES,
    SMALL,
    STEPS,
    batch,
    dense_weights,
    digest_of,
    whole_weights,
)
from hf_drt.trainer import DRTTrainer, DRTTrainingArguments


class TrainerLoop:
    """A Trainer of the model, the batches and the optimizer that :class:`hf_drt.doctor.trial_loop.TrialLoop` has.

    Args:
        settings: Of ``TrainingArguments``, which begin the engine.
        device: Of this process.
        world: How many processes there are.
        folder: Where the run is saved, and resumed from.
        resumes: Whether to go on from there, with a model that has other weights.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device, world: int, folder: Path, resumes: bool = False):
        arguments = DRTTrainingArguments(
            output_dir=str(folder), use_cpu=device.type == "cpu", max_steps=STEPS, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=ROWS // world, train_sampling_strategy="sequential", seed=0,
            optim="adamw_torch", learning_rate=LEARNING_RATE, adam_epsilon=SMALL, weight_decay=0.0, max_grad_norm=0.0,
            lr_scheduler_type="constant", logging_steps=1, logging_nan_inf_filter=False, save_strategy="steps",
            save_steps=SAVED, dataloader_pin_memory=False, drt_schedule=SCHEDULE, drt_rank=RANK, **settings,
        )  # fmt: skip
        self.checkpoint = str(folder / f"checkpoint-{SAVED}") if resumes else None
        self.trainer = DRTTrainer(
            model=decoder(*SIZES, seed=1 if resumes else 0, kind=_WithLoss), args=arguments,
            train_dataset=[{"ids": row} for step in range(STEPS) for row in batch(step)],  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self, end: int = STEPS, after: Callable[[], None] | None = None) -> list[float]:
        """Make the updates up to ``end``; the losses of all rows."""
        self.trainer.add_callback(_After(end, after))
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        return [row["loss"] for row in self.trainer.state.log_history if "loss" in row]

    # ---- what it holds; all of it is collective

    def digest(self) -> str:
        """A fingerprint of the bits of all weights."""
        return digest_of(whole_weights(self.trainer.model).items())

    def dense(self) -> dict[str, Tensor]:
        """W of every layer that changes form, and all other weights, whole and on the CPU."""
        return dense_weights(self.trainer.model, self.trainer.drt)


class _WithLoss(Decoder):
    """The decoder as a Trainer calls it."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(ids)
        return {"loss": next_token_loss(logits, ids), "logits": logits}


class _After(TrainerCallback):
    """What is looked at after each update, and the end of the run."""

    def __init__(self, end: int, after: Callable[[], None] | None):
        self.end, self.after = end, after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after is not None:
            self.after()
        if state.global_step >= self.end:
            control.should_training_stop = True
