"""Pretrain to full rank in turns, under a limit on the process's memory in which dense training fails.

With no argument: a Llama of 110 M parameters from scratch on the source text of Python's standard library, AdamW in
float32, 2 x 512 tokens an update. Dense training and the preset `rotate` run a few updates in every phase, each in a
process of its own; what their tensors take is counted and held against what `hf-drt plan` predicts. Then both run once
more under the limit. A dense update is 0.8 TFLOP, and there are some sixty updates in all.

    python recipes/pretrain_in_memory.py
    python recipes/pretrain_in_memory.py --frozen_dtype bfloat16 --dense_checkpointing --recompute
    python recipes/pretrain_in_memory.py --groups 4 --rank_ratio 0.25 --limit 2000

What it shows: memory and time of every phase, the most that a switch needs, and that the rotation trains where dense
training cannot. When it does not help: where activations take most of the memory; checkpoint them first.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from pretrain_clm import RecipeArguments, blocks, load_texts, load_tokenizer
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, TrainerCallback, default_data_collator

from hf_drt import DRTConfig, DRTTrainer, DRTTrainingArguments, DynamicRank
from hf_drt.simulate import RunEstimate, StepCounter, batch_spec, estimate_run
from hf_drt.tables import markdown_table

MIB = 2**20
OUT_OF_MEMORY = 12  # exit status of a run for which there was not enough memory


@dataclass
class Options:
    """The model, the rotation and the limit."""

    hidden_size: int = field(default=768, metadata={"help": "Width of the model; a multiple of 64."})
    intermediate_size: int = field(default=1792, metadata={"help": "Width of its MLPs."})
    layers: int = field(default=16, metadata={"help": "Its blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Of its tokenizer."})
    block_size: int = field(default=512, metadata={"help": "Tokens per sample."})
    batch_size: int = field(default=2, metadata={"help": "Samples per update."})
    groups: int = field(default=8, metadata={"help": "Of the rotation."})
    rank_ratio: float = field(default=0.125, metadata={"help": "Of the layers that wait."})
    order: str = field(default="ascending", metadata={"help": "Of the groups."})
    after: str = field(default="frozen", metadata={"help": "Form of a group whose turn is over."})
    frozen_dtype: str | None = field(default=None, metadata={"help": "bfloat16: 2 bytes a frozen weight."})
    dense_checkpointing: bool = field(default=False, metadata={"help": "Checkpoint activations in turns."})
    recompute: bool = field(default=False, metadata={"help": "Of factored blocks keep what the bottleneck gives."})
    steps: int = field(default=3, metadata={"help": "Updates in every phase; the first is not timed."})
    limit: float | None = field(default=None, metadata={"help": "MiB beside code and libraries; unset: chosen."})
    max_texts: int | None = field(default=200, metadata={"help": "Read at most so many texts."})
    cache_dir: str = field(default="~/.cache/hf_drt", metadata={"help": "Folder of the trained tokenizer."})

    def schedule(self, method: str) -> str:
        """The phases of a run, ``steps`` updates each."""
        if method in ("dense", "checkpointed"):
            return "dense@0"
        if method == "forms":
            return f"factored@0 frozen@{self.steps}"
        turns = f"order={self.order},after={self.after}"
        share = 100 * self.groups / (self.groups + 1)
        return f"rotate(groups={self.groups},share={share:.6f},{turns})"

    def phases(self, method: str) -> int:
        """How many phases it has."""
        return {"dense": 1, "checkpointed": 1, "forms": 2}.get(method, self.groups + 1)

    def settings(self, method: str) -> dict[str, Any]:
        """Settings of dynamic-rank training."""
        # What the ranks of all layers take, at the end of a phase, is not part of a step or switch.
        given: dict[str, Any] = {"schedule": self.schedule(method), "log_rank_steps": 0}
        if method in ("dense", "checkpointed"):
            return given
        given["rank_ratio"] = self.rank_ratio
        given |= {"recompute": "bottleneck"} if self.recompute else {}
        given |= {"frozen_dtype": self.frozen_dtype} if self.frozen_dtype and self.after == "frozen" else {}
        if method == "rotate":
            given |= {"start": "scratch"}
            given |= {"dense_checkpointing": True} if self.dense_checkpointing else {}
        return given


# ---- one run, in a process of its own


class Meter(TrainerCallback):
    """Bytes and seconds of every update."""

    def __init__(self) -> None:
        self.counter = StepCounter()
        self.rows: list[dict[str, Any]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for tensor in (*self.trainer.model.parameters(), *self.trainer.model.buffers()):
            self.counter.add(tensor)
        self.counter.__enter__()
        self.begun = time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(self.trainer.model.parameters())
        self.gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        self.weights = sum(p.nbytes for p in parameters)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, counter, phase = time.process_time(), self.counter, self.trainer.drt.phase
        kept = [t for s in self.trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        self.rows.append(
            {"phase": phase, "seconds": now - self.begun, "weights": self.weights, "gradients": self.gradients,
             "optimizer": sum(t.nbytes for t in kept), "live": counter.peak}
        )  # fmt: skip
        counter.peak, self.begun = counter.now, time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter.__exit__(None, None, None)


def new_model(options: Options, vocab_size: int) -> torch.nn.Module:
    """A Llama with tied embeddings, from scratch."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=options.hidden_size, intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=options.block_size, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def train(options: Options, method: str, limit: float | None, folder: str) -> list[dict[str, Any]]:
    """Train, and return a row per update."""
    recipe = RecipeArguments(vocab_size=options.vocab_size, block_size=options.block_size,
                             max_texts=options.max_texts, cache_dir=options.cache_dir)  # fmt: skip
    texts = load_texts(recipe)
    tokenizer = load_tokenizer(recipe, texts)
    data = blocks(texts, tokenizer, options.block_size, 400)
    if limit is not None:
        load_what_waits()
        bound = data_bytes() + round(limit * MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    torch.manual_seed(0)
    args = DRTTrainingArguments(
        output_dir=folder, max_steps=options.steps * options.phases(method), learning_rate=1e-3, warmup_steps=2,
        per_device_train_batch_size=options.batch_size, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1_000_000, optim="adamw_torch", dataloader_pin_memory=False, use_cpu=True,
        gradient_checkpointing=method == "checkpointed",
        **{f"drt_{name}": value for name, value in options.settings(method).items()},
    )  # fmt: skip
    meter = Meter()
    trainer = DRTTrainer(model=new_model(options, len(tokenizer)), args=args, train_dataset=data,
                         data_collator=default_data_collator, callbacks=[meter])  # fmt: skip
    meter.trainer = trainer
    trainer.train()
    return meter.rows


def load_what_waits() -> None:
    """What is loaded or started at its first use counts among the libraries: the threads of products and of backward
    passes, with their stacks, and DeepSpeed, which Accelerate loads wherever it is installed."""
    extract_model_from_parallel(torch.nn.Identity())
    layer = torch.nn.Linear(1024, 1024)
    layer(torch.ones(1024, 1024)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def data_bytes() -> int:
    """What the process has of the memory that RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmData, by which the limit is set; this recipe runs on Linux.")


def child(request: str) -> None:
    """The process of one run."""
    given = json.loads(request)
    options = Options(**given["options"])
    try:
        rows = train(options, given["method"], given["limit"], given["folder"])
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(OUT_OF_MEMORY)
        raise
    Path(given["folder"], "rows.json").write_text(json.dumps(rows))


def run(options: Options, method: str, limit: float | None = None) -> list[dict[str, Any]] | None:
    """A run's rows; None where its memory was not enough."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"options": asdict(options), "method": method, "limit": limit, "folder": folder}
        # Freed memory goes back at once, so that the limit counts what is alive.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, __file__, "--child", json.dumps(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == OUT_OF_MEMORY:
            return None
        if done.returncode:
            raise RuntimeError(f"the run '{method}' failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(folder, "rows.json").read_text())


# ---- what was predicted, and what came of it


def predicted(options: Options, method: str) -> RunEstimate:
    """What ``hf-drt plan`` says of the same run."""
    with torch.device("meta"):
        model = new_model(options, options.vocab_size)
    config = DRTConfig(**options.settings(method))
    steps = options.steps * options.phases(method)
    controller = DynamicRank(model, config, max_steps=steps, in_trainer=True)
    batch = batch_spec(model, options.batch_size, options.block_size)
    return estimate_run(controller, batch, optimizer="adamw_torch")


def by_phase(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of every phase the bytes of its updates but the first, which has the switch before it, and their mean seconds."""
    found = []
    for phase in sorted({row["phase"] for row in rows}):
        first, *others = [row for row in rows if row["phase"] == phase]
        last = others[-1]
        seconds = sum(row["seconds"] for row in others) / len(others)
        found.append({
            "held": last["weights"] + last["gradients"] + last["optimizer"],
            "live": max(row["live"] for row in others), "switch": first["live"],
            "seconds": seconds, "switch_seconds": first["seconds"] - seconds,
        })  # fmt: skip
    return found


def mixture(options: Options, dense: float, factored: float, frozen: float, phase: int) -> float:
    """Seconds of a step in a phase of the rotation, by its mixture of forms: those of steps in which all layers are in
    one of them, weighted by the share of the groups in it."""
    if phase == 0:
        return factored
    done, waiting = phase - 1, options.groups - phase
    after = frozen if options.after == "frozen" else factored
    return (dense + done * after + waiting * factored) / options.groups


def main(arguments: list[str] | None = None) -> int:
    """Both runs, the table, and both again under the limit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        child(arguments[1])
        return 0
    (options,) = HfArgumentParser(Options, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(arguments)
    if options.steps < 2:
        raise ValueError(f"--steps must be at least 2, since the first of a phase is not timed, got {options.steps}.")
    runs = {method: by_phase(run(options, method) or []) for method in ("dense", "checkpointed", "forms", "rotate")}
    plan = predicted(options, "rotate")
    print_phases(options, runs, plan)
    live, most = max(row["live"] for row in runs["rotate"]), runs["dense"][0]["live"]
    limit = options.limit or (live + most) / 2 / MIB
    print(f"\nunder a limit of {limit:,.0f} MiB beside code and libraries:")
    outcomes = {method: run(options, method, limit) is not None for method in ("dense", "rotate")}
    for method, runs_through in outcomes.items():
        print(f"    {method}: {'runs through' if runs_through else 'fails, out of memory'}")
    return 0 if outcomes == {"dense": False, "rotate": True} else 1


def print_phases(options: Options, runs: dict[str, list[dict[str, float]]], plan: RunEstimate) -> None:
    """Memory and time of every phase beside what was predicted; MiB, and shares of dense training."""
    dense, checkpointed = runs["dense"][0], runs["checkpointed"][0]
    factored, frozen = (row["seconds"] for row in runs["forms"])
    # Checkpointed blocks are so in all their forms; there are no runs of single forms that would tell their steps.
    told = not options.dense_checkpointing
    head = ("phase", "held", "of dense", "predicted", "live", "of dense", "predicted", "with the switch", "s/step",
            "by its forms", "switch s")  # fmt: skip
    rows = [["dense", mib(dense["held"]), "1.000", mib(plan.dense.held), mib(dense["live"]), "1.000",
             mib(plan.dense.peak), "-", f"{dense['seconds']:.2f}", "-", "-"],
            ["dense, checkpointed", mib(checkpointed["held"]), f"{checkpointed['held'] / dense['held']:.3f}", "-",
             mib(checkpointed["live"]), f"{checkpointed['live'] / dense['live']:.3f}", "-", "-",
             f"{checkpointed['seconds']:.2f}", "-", "-"]]  # fmt: skip
    for index, (row, phase) in enumerate(zip(runs["rotate"], plan.phases, strict=True)):
        expected = f"{mixture(options, dense['seconds'], factored, frozen, index):.2f}" if told else "-"
        rows.append([
            phase.form, mib(row["held"]), f"{row['held'] / dense['held']:.3f}", mib(phase.step.held),
            mib(row["live"]), f"{row['live'] / dense['live']:.3f}", mib(phase.step.peak), mib(row["switch"]),
            f"{row['seconds']:.2f}", expected, f"{row['switch_seconds']:.2f}" if index else "-",
        ])  # fmt: skip
    print(markdown_table(list(head), rows))
    print("held: weights, gradients and optimizer state; live: all tensors at their peak; MiB; CPU seconds")


def mib(size: float) -> str:
    return f"{size / MIB:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
