"""A run that goes on with another number of processes keeps the rows of an update.

An update sees ``per_device_train_batch_size x gradient_accumulation_steps x processes`` rows of the data. Learning
rates, phases and the place in the data are counted in updates, so that with other rows it is another run: it goes on at
another row of the epoch, and ends after another number of epochs.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from hf_drt.checkpoint import STATE_NAME, CheckpointError, read_state
from hf_drt.engines import launched_processes

logger = logging.getLogger(__name__)

BATCH = "batch"  # of drt_state.json
_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def divide_batch(rows: int, per_device: int, processes: int | None = None) -> dict[str, int]:
    """Training arguments with which an update sees ``rows`` rows, however many processes are started::

        args = DRTTrainingArguments("out", **divide_batch(64, per_device=8))

    Args:
        rows: Of one update, on all processes together.
        per_device: At most so many at once, by what fits into memory.
        processes: That train together; by default as many as torchrun or another launcher has started.

    Returns:
        ``per_device_train_batch_size``, the largest that divides evenly, and ``gradient_accumulation_steps``.

    Raises:
        ValueError: A number below 1, or rows that cannot be divided among the processes.
    """
    processes = launched_processes() if processes is None else processes
    for name, number in {"rows": rows, "per_device": per_device, "processes": processes}.items():
        if not _is_count(number):
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if rows % processes:
        numbers = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise ValueError(
            f"the {rows} rows of an update cannot be divided among {processes} processes. Start {numbers} of them; or "
            f"take a multiple of {processes} as the rows of an update."
        )
    each = rows // processes
    largest = next(size for size in range(min(per_device, each), 0, -1) if each % size == 0)
    return dict(zip(_SETTINGS, (largest, each // largest), strict=True))


@dataclass(frozen=True)
class Batch:
    """The rows of an update, and how they are divided.

    Attributes:
        rows: Of one update, on all processes together.
        processes: Among which they are divided.
        per_device: ``per_device_train_batch_size``, as the user has set it.
        accumulation: ``gradient_accumulation_steps``, as the user has set it.
    """

    rows: int
    processes: int
    per_device: int
    accumulation: int

    @classmethod
    def of(cls, args: TrainingArguments) -> "Batch":
        """Of a run with these arguments, on the processes that Accelerate has joined."""
        processes = _data_parallel(args)
        at_once = args.train_batch_size * (1 if _splits(args) else processes)
        return cls(at_once * args.gradient_accumulation_steps, processes, *_settings(args).values())

    @classmethod
    def noted_in(cls, folder: str) -> "Batch | None":
        """That of the run which wrote a checkpoint; None where there is no note of it.

        Raises:
            CheckpointError: It is damaged.
        """
        state = read_state(folder) if Path(folder, STATE_NAME).is_file() else {}
        noted = state.get(BATCH)
        if noted is None:
            return None
        names = {field.name for field in fields(cls)}
        if not isinstance(noted, dict) or noted.keys() != names or not all(map(_is_count, noted.values())):
            raise CheckpointError(
                f"{Path(folder, STATE_NAME)} is damaged: its {BATCH!r} is {noted!r}. Resume from another checkpoint."
            )
        return cls(**noted)

    def note(self) -> dict[str, dict[str, int]]:
        """For a checkpoint's state."""
        return {BATCH: asdict(self)}

    @property
    def _asked(self) -> tuple[int, int]:
        return self.per_device, self.accumulation


def noted(batch: Batch | None) -> dict[str, Any]:
    """What ``drt_state.json`` says of a batch, if there is one."""
    return {} if batch is None else batch.note()


@contextlib.contextmanager
def rows_kept(trainer: Any, folder: str | None) -> Iterator[Batch | None]:
    """In the block the trainer's updates see as many rows as in the run that wrote a checkpoint, where nothing but the
    number of processes is another. After it the arguments are as they were.

    Args:
        trainer: That is about to train.
        folder: The checkpoint that it goes on from, or None.

    Yields:
        What its own checkpoints note; None where the Trainer finds the batch by itself (``auto_find_batch_size``).

    Raises:
        CheckpointError: The rows cannot be divided among the processes, or the checkpoint's note is damaged.
    """
    args, says = trainer.args, trainer.is_world_process_zero()
    if args.auto_find_batch_size:
        yield None
        return
    own = Batch.of(args)
    before = Batch.noted_in(folder) if folder is not None else None
    if before is None or before.rows == own.rows:
        kept = contextlib.nullcontext()
    elif before._asked == own._asked and not _splits(args) and not trainer.is_deepspeed_enabled:
        settings = _divided(before, own, folder)
        if says:
            logger.warning(
                "%s is of %s, and these would be %s. To keep the rows, this run has %s. If you want other rows, set "
                "one of the two otherwise than in that run.",
                folder, _told(before, before.processes), _told(own, own.processes), _listed(settings),
            )  # fmt: skip
        kept, own = _set(trainer, settings), replace(own, rows=before.rows)
    else:
        kept = contextlib.nullcontext()
        if says:
            logger.warning(
                "%s is of %s, and this run has %s: learning rates and phases are counted in updates, and it goes on "
                "at another row of the data. To keep the rows, set %s.",
                folder, _told(before, before.processes), _told(own, own.processes), _advice(before, own),
            )  # fmt: skip
    if before is not None and before.processes != own.processes and says:
        _warn_of_order(args)
    with kept:
        yield own


def _divided(before: Batch, own: Batch, folder: str | None) -> dict[str, int]:
    try:
        return divide_batch(before.rows, own.per_device, own.processes)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} is of {_told(before, before.processes)}, and {error} To go on with other rows all the same, set "
            "per_device_train_batch_size or gradient_accumulation_steps otherwise than in that run."
        ) from None


def _advice(before: Batch, own: Batch) -> str:
    try:
        return _listed(divide_batch(before.rows, own.per_device, own.processes))
    except ValueError:
        return f"them so that their product with a number of processes is {before.rows}"


def _warn_of_order(args: TrainingArguments) -> None:
    if args.train_sampling_strategy == "group_by_length":
        logger.warning(
            "the order of the data is another than with the former number of processes: "
            "train_sampling_strategy=group_by_length sorts within what one process sees in an update."
        )


@contextlib.contextmanager
def _set(trainer: Any, settings: dict[str, int]) -> Iterator[None]:
    before = _settings(trainer.args)
    try:
        _put(trainer, settings)
        yield
    finally:
        _put(trainer, before)


def _put(trainer: Any, settings: dict[str, int]) -> None:
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    trainer._train_batch_size = trainer.args.train_batch_size


def _data_parallel(args: TrainingArguments) -> int:
    """Processes that see rows of their own."""
    parallel = getattr(AcceleratorState(), "parallelism_config", None)
    return args.world_size // (1 if parallel is None else parallel.non_data_parallel_size)


def _splits(args: TrainingArguments) -> bool:
    """Whether a batch of ``per_device_train_batch_size`` is that of all processes together."""
    return bool(getattr(args.accelerator_config, "split_batches", False))


def _settings(args: TrainingArguments) -> dict[str, int]:
    return {name: getattr(args, name) for name in _SETTINGS}


def _told(batch: Batch, processes: int) -> str:
    return f"{batch.rows} rows an update on {processes} process{'es' if processes > 1 else ''}"


def _listed(settings: dict[str, int]) -> str:
    return " and ".join(f"{name}={value}" for name, value in settings.items())


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
