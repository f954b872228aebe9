"""Run folders written by hand, with numbers that are easy to follow, and trained ones."""

import json
from pathlib import Path
from typing import Any

from hf_drt.checkpoint.state_file import write_state

LAYERS = [f"model.layers.{block}.{part}" for block in (0, 2, 10) for part in ("self_attn.q_proj", "mlp.up_proj")]


def write_log(folder: Path, rows: list[dict[str, Any]], step: int | None = None, max_steps: int = 20) -> Path:
    """``trainer_state.json`` as the Trainer writes it: keys sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"] if step is None else step, "max_steps": max_steps, "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    return folder


def write_plan(folder: Path, plan: str = "factored@0 dense@10", step: int = 20, **changes: Any) -> Path:
    """``drt_state.json`` of a checkpoint, as far as a report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: {"shape": [8, 8], "form": "dense"} for name in LAYERS}
    state = {"plan": plan, "max_steps": 20, "phase": 1, "settings": {}, "layers": layers, "step": step}
    write_state(folder, state | changes)
    return folder


def ranks(value: float) -> dict[str, float]:
    """A row's effective ranks: each layer's is 1 above that of the layer before."""
    values = {f"drt_effective_rank/{name}": value + index for index, name in enumerate(LAYERS)}
    return {"drt_effective_rank_mean": value + 2.5, "drt_effective_rank_min": value, **values}


def rows(final: float = 2.0) -> list[dict[str, Any]]:
    """Ten steps in factored form of 1 s, a switch of 2 s, ten dense steps of 0.5 s; the first switch takes 1 s."""
    return [
        {"step": 0, "drt_phase": 0, "drt_switch_seconds": 1.0, "drt_truncation_error": 0.7, "drt_merge_error": 0.0,
         "drt_trainable_parameters": 100, "drt_rank_min": 2, "drt_rank_max": 4, "drt_plan_flops": 0.75,
         "drt_plan_parameters": 0.5, "drt_seconds": 1.0},
        {"step": 5, "loss": 4.0, "learning_rate": 0.1, "grad_norm": 1.5},
        {"step": 10, **ranks(3.0), "drt_phase": 0, "drt_phase_steps": 10, "drt_phase_seconds": 10.0,
         "drt_tokens_per_second": 80.0, "drt_samples_per_second": 8.0, "drt_peak_memory_mib": 64.0,
         "drt_seconds": 11.0},
        {"step": 10, "loss": 3.5, "learning_rate": 0.2, "grad_norm": 2.5},
        {"step": 10, "eval_loss": 3.25, "eval_runtime": 7.0, "eval_samples_per_second": 3.0},
        {"step": 10, "drt_phase": 1, "drt_switch_seconds": 2.0, "drt_truncation_error": 0.0, "drt_merge_error": 0.0,
         "drt_trainable_parameters": 300, "drt_function_error": 0.125, "drt_seconds": 13.0},
        {"step": 15, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 0.5},
        {"step": 20, **ranks(5.0), "drt_phase": 1, "drt_phase_steps": 10, "drt_phase_seconds": 5.0,
         "drt_tokens_per_second": 160.0, "drt_samples_per_second": 16.0, "drt_peak_memory_mib": 96.0,
         "drt_seconds": 18.0},
        {"step": 20, "loss": 2.5, "learning_rate": 0.0, "grad_norm": 0.25},
        {"step": 20, "eval_loss": final, "eval_runtime": 7.0, "eval_samples_per_second": 3.0},
        {"step": 20, "train_runtime": 40.0, "train_samples_per_second": 4.0, "train_loss": 3.1, "total_flos": 5.0},
    ]  # fmt: skip


def dynamic_run(folder: Path, final: float = 2.0) -> Path:
    """A run of two phases, that has ended."""
    write_plan(folder / "checkpoint-20")
    return write_log(folder, rows(final))


def plain_run(folder: Path, final: float = 1.75) -> Path:
    """A run of a plain Trainer: 20 steps in 50 s, 10 of them in two evaluations; a third one after it."""
    log = [
        {"step": 5, "loss": 4.5, "learning_rate": 0.1},
        {"step": 10, "eval_loss": 3.5, "eval_runtime": 4.0},
        {"step": 20, "loss": 2.25, "learning_rate": 0.0},
        {"step": 20, "eval_loss": final, "eval_runtime": 6.0},
        {"step": 20, "train_runtime": 50.0, "train_samples_per_second": 3.2, "train_loss": 3.0},
        {"step": 20, "eval_loss": final, "eval_runtime": 100.0},
    ]
    return write_log(folder, log)


def trained_run(folder: Path) -> Path:
    """A real one, of a tiny Llama: three phases, ranks by layer."""
    import tiny

    trainer = tiny.trainer(
        folder, drt_schedule="factored@0 dense@40% adapter@80%", drt_log_rank_steps=4, drt_log_rank_per_layer=True,
        eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=10, logging_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    return folder
