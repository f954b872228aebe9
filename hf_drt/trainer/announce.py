"""The resolved plan, said once at the start of training."""

import logging

from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments

from hf_drt.planning import ResolvedPlan, chosen, description, headline

logger = logging.getLogger(__name__)


def announce(resolved: ResolvedPlan, args: TrainingArguments, state: TrainerState) -> None:
    """Print the plan as visibly as the Trainer its progress bar: on the main process, and not where ``disable_tqdm`` or
    a log level above warnings asks for silence. Its first line goes to the log, at level info, with the ranks, the
    budget behind them and the matrix optimizer."""
    quiet = args.disable_tqdm or max(args.get_process_log_level(), logger.getEffectiveLevel()) > logging.WARNING
    if state.is_world_process_zero and not quiet:
        tqdm.write("\n  ".join(description(resolved)))  # above the bar, which the Trainer has drawn already
    logger.info("; ".join([headline(resolved), *chosen(resolved)]))
