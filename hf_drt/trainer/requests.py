"""SwitchRequests: the evaluation and the checkpoint that the end of a phase asks of a Trainer."""

from collections.abc import Callable

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_drt.config import DRTConfig


class SwitchRequests:
    """What ends of phases ask for beside the Trainer's own strategies, and which of it the present step is due to.

    Args:
        config: Settings ``evaluate_at_switch``, ``save_at_switch`` and ``tag_phases``.
    """

    def __init__(self, config: DRTConfig):
        self._config = config
        self._evaluates_at: int | None = None  # update step whose evaluation nothing but a switch has asked for
        self._saves_at: int | None = None  # update step that a switch has asked to save

    def ask(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, phase_ends: bool, switches: bool
    ) -> None:
        """Evaluate and save at the end of a phase. A score that may become the best one is saved with its weights,
        which load_best_model_at_end looks for; under save_strategy=best the Trainer sees to that itself.

        Args:
            phase_ends: Whether the update step that has ended is the last of a phase.
            switches: Whether another phase follows.
        """
        evaluates = switches and self._config.evaluate_at_switch and not _is_delayed(args, state)
        loads_best = args.load_best_model_at_end and args.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST)
        saves = (switches and self._config.save_at_switch) or (phase_ends and self._config.tag_phases)
        saves = saves or (evaluates and loads_best)
        self._evaluates_at = state.global_step if evaluates and not control.should_evaluate else None
        self._saves_at = state.global_step if saves else None
        control.should_evaluate |= evaluates
        control.should_save |= saves

    def epoch_ends(self) -> None:
        """An evaluation that follows is the Trainer's."""
        self._evaluates_at = None

    def saves_best(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, compare: Callable[[], bool]
    ) -> bool:
        """Whether a step that was just evaluated is to be saved for its score or at a switch's request.

        Under save_strategy=best the Trainer takes that answer for all there is to save. An evaluation of ours becomes
        the best score only if the step is saved.

        Args:
            compare: The Trainer's own answer, whether the score is the best one; it puts it down in ``state``.
        """
        if state.global_step not in (self._evaluates_at, self._saves_at):
            return compare()
        before = state.best_metric, state.best_global_step
        best = compare()
        saves = control.should_save or (best and args.save_strategy == SaveStrategy.BEST)
        if not saves and state.global_step == self._evaluates_at:
            state.best_metric, state.best_global_step = before
        return saves


def _is_delayed(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether eval_delay, in the unit of eval_strategy, forbids an evaluation yet."""
    match args.eval_strategy:
        case IntervalStrategy.STEPS:
            return state.global_step < args.eval_delay
        case IntervalStrategy.EPOCH:
            return (state.epoch or 0.0) < args.eval_delay
    return False
