"""Which checkpoint a run goes on from."""

import logging
import os
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_drt.checkpoint import STATE_NAME, CheckpointError, read_state
from hf_drt.trainer.checkpoint import last_complete_checkpoint
from hf_drt.trainer.saving import is_finished, recover, unfinished

logger = logging.getLogger(__name__)

AUTO = "auto"


def asked_for(given: str | bool | None, default: str | None) -> str | bool | None:
    """What a script gives ``train()``, where it names a folder; else the default, if there is one."""
    return given if isinstance(given, str) else default or given


def checkpoint_for(trainer: Any, asked: str | bool | None) -> str | None:
    """The folder that ``train(resume_from_checkpoint=asked)`` goes on from, the same on all processes.

    Args:
        trainer: That is about to train.
        asked: A folder; True for the last complete checkpoint; ``"auto"`` for that, or None where nothing has been
            saved yet, as before the first save and after a kill within it; None or False for a new run.

    Raises:
        CheckpointError: There is no complete one; with ``"auto"``, though there are some.
    """
    if not asked:
        _warn_of_a_restart(trainer)
        return None
    named = asked is not True and asked != AUTO
    run_dir = Path(str(asked)).parent if named else Path(trainer.args.output_dir)
    if trainer.args.should_save:
        recover(run_dir)
    trainer.accelerator.wait_for_everyone()
    if named:
        return str(asked)
    if asked == AUTO and not _are_saved(run_dir):
        if trainer.is_world_process_zero():
            logger.info("%s holds no checkpoint yet: training begins at update step 0.", run_dir)
        return None
    return last_complete_checkpoint(run_dir)


def last_finished(run_dir: str | None) -> str | None:
    """The last checkpoint of a run without dynamic-rank training that a kill has not cut short; None without one."""
    found = [path for path in _checkpoints(Path(str(run_dir))) if is_finished(path)]
    return str(max(found, key=_step)) if found else None


def _are_saved(run_dir: Path) -> bool:
    """Whether process 0 finds a checkpoint, be it damaged, that is not just the remains of a kill within a save."""
    cut_short = set(unfinished(run_dir))
    found = [path for path in _checkpoints(run_dir) if path not in cut_short and any(path.iterdir())]
    return bool(broadcast_object_list([bool(found)])[0])


def _checkpoints(run_dir: Path) -> list[Path]:
    found = (path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return [path for path in found if path.name.rpartition("-")[2].isdigit()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _warn_of_a_restart(trainer: Any) -> None:
    """torchrun has started the processes again, and the script begins anew over what they have saved."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and trainer.is_world_process_zero() and _checkpoints(Path(trainer.args.output_dir)):
        logger.warning(
            "torchrun has restarted this job (%s times so far), and training begins anew, though %s holds checkpoints. "
            "To go on from the last one, call train(resume_from_checkpoint='auto'); under python -m hf_drt.run pass "
            "--drt_resume auto.",
            restarts,
            trainer.args.output_dir,
        )


def refuse_low_rank(folder: str) -> None:
    """A checkpoint of dynamic-rank training must not be resumed without it.

    Raises:
        CheckpointError: It is one.
    """
    if (Path(folder) / STATE_NAME).is_file():
        raise CheckpointError(
            f"{folder} was written by dynamic-rank training, which is off here. Its plan is "
            f"drt_schedule='{read_state(folder).get('plan')}'; set it and the other drt settings as they were then."
        )
