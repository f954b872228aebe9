"""Training that ends before its plan does: which phases were never reached, and what the model lacks for it."""

import logging
from collections.abc import Sequence

from hf_drt.schedule import Phase, Plan

logger = logging.getLogger(__name__)


def warn_of_early_end(plan: Plan, step: int) -> None:
    """Say so if training ends at update ``step``, whatever has ended it, and phases of the plan had not begun."""
    missed = [phase for phase in plan.phases[1:] if phase.start >= step]
    if missed and step < plan.max_steps:
        logger.warning(
            "training ended after %d of %d update steps, before '%s' of the plan '%s' began: %s Give what ended it "
            "more patience (early_stopping_patience of EarlyStoppingCallback, a longer time limit), let these phases "
            "begin earlier, or resume from the last checkpoint.",
            step,
            plan.max_steps,
            " ".join(map(str, missed)),
            plan,
            _consequence(plan.phases[: -len(missed)], missed),
        )


def _consequence(reached: Sequence[Phase], missed: Sequence[Phase]) -> str:
    kinds = list(dict.fromkeys(kind for phase in reached for kind in phase.kinds))
    if "dense" not in kinds and any("dense" in phase.kinds for phase in missed):
        return f"the model was trained in {' and '.join(kinds)} form only, and never at full rank."
    return f"what the model has learned last is that of phase '{reached[-1]}'."
