"""What was asked of Accelerate and is not what runs: it falls back in silence. Said once, by the first process."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from hf_drt.engines import is_joined

logger = logging.getLogger(__name__)

_DEFAULT_TIMEOUT = 1800  # of TrainingArguments.ddp_timeout


def warn_of_fallbacks(args: TrainingArguments) -> None:
    """Say of every engine, precision and number that was asked for what is done in its place, and what to do.

    Args:
        args: Of a Trainer that has been made, whose Accelerator the process has.
    """
    if args.process_index == 0:
        for message in fallbacks(args, AcceleratorState()):
            logger.warning(message)


def fallbacks(args: TrainingArguments, state: Any) -> Iterator[str]:
    """The messages.

    Args:
        args: What was asked for, beside the environment, in which ``accelerate launch`` says it.
        state: Accelerate's, of what runs.
    """
    on_cpu = state.device.type == "cpu"
    sharded = getattr(state, "fsdp_plugin", None) is not None
    deepspeed = getattr(state, "deepspeed_plugin", None) is not None
    plain = _plain(state.num_processes)
    if (args.fsdp or _is_on("ACCELERATE_USE_FSDP")) and not sharded:
        yield (
            f"fsdp was asked for, but the model is not sharded: Accelerate trains with {plain} here, as it does on a "
            "CPU or with one process. Every process holds the whole model. For FSDP start several processes on GPUs "
            "(torchrun, without use_cpu); or leave fsdp out."
        )
    elif args.fsdp_config and not args.fsdp:
        engine = "by the settings of accelerate launch" if sharded else f"with {plain}"
        yield (
            f"fsdp_config was given without fsdp, and is not read: this run trains {engine}. Say fsdp=True (--fsdp); "
            "or leave fsdp_config out."
        )
    if (args.deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED")) and not deepspeed:
        yield (
            f"deepspeed was asked for, but Accelerate trains with {plain}: ACCELERATE_USE_CPU is set, as by "
            "accelerate launch --cpu. Start the processes with torchrun, and use_cpu=True if they have no GPU; or "
            "leave deepspeed out."
        )
    if state.mixed_precision == "fp16" and on_cpu and not deepspeed:
        given = "fp16=True" if args.fp16 else "ACCELERATE_MIXED_PRECISION=fp16"
        yield (
            f"{given} has no effect: Accelerate has no fp16 on a CPU, and trains in the dtype of the weights without "
            "a gradient scaler. Use bf16=True, or leave it out."
        )
    compiler = state.dynamo_plugin.backend
    if args.torch_compile and compiler == DynamoBackend.NO:
        yield (
            "torch_compile was asked for, but nothing is compiled: the Accelerator of this process was made without "
            "it, for an earlier trainer or by the script. Make these training arguments after that trainer has been "
            "used; or leave torch_compile out."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # 1 is the launcher's default
    if steps.isdigit() and int(steps) not in (1, args.gradient_accumulation_steps) and not deepspeed:
        yield (
            f"accelerate launch was given gradient_accumulation_steps={steps}, but the Trainer goes by its own "
            f"setting: an update is made of {args.gradient_accumulation_steps} here. Set the training argument "
            f"gradient_accumulation_steps={steps}."
        )
    waits = _seconds_waited()
    if args.ddp_timeout != _DEFAULT_TIMEOUT and waits not in (None, args.ddp_timeout):
        yield (
            f"ddp_timeout={args.ddp_timeout} has no effect: a process that waits for another does so for {waits:g} s. "
            "On a CPU transformers does not hand the setting on: call torch.distributed.init_process_group(timeout="
            "datetime.timedelta(seconds=...)) before the training arguments are made; or leave it out."
        )
    yield from _fewer_processes(state.num_processes)


def _fewer_processes(number: int) -> Iterator[str]:
    """Launchers that were to start several processes which train together, where it looks as if they do not."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and int(tasks) > number:
        yield (
            f"srun has started {tasks} tasks, but {_plain(number)} trains here: each task trains on all data by "
            "itself. If they are to train together, let srun start one torchrun on each node, with --rdzv_endpoint; "
            "if not, give each an output_dir of its own."
        )
    if number == 1 and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        yield (
            "accelerate launch seems to have been asked for several processes, but has started one: on a CPU it "
            "needs --mpirun_hostfile for more. Start them with torchrun --nproc_per_node N and use_cpu=True; or ask "
            "for one."
        )


def _seconds_waited() -> float | None:
    """After which a process of the group gives up on the others; None where there is none, or nobody can tell."""
    if not is_joined():
        return None
    try:
        backend: Any = dist.group.WORLD
        return backend._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return None


def _plain(processes: int) -> str:
    return f"DistributedDataParallel on {processes} processes" if processes > 1 else "a single process"


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
